package seal

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestWordsRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		root := Root(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(rt, "root"))
		// A root may begin with zero bytes; so may the number it spells.
		clear(root[:rapid.IntRange(0, 32).Draw(rt, "zeros")])
		words, err := root.Words()
		if err != nil {
			rt.Fatal(err)
		}
		got, err := RootFromWords("  " + strings.ToUpper(strings.ReplaceAll(words, " ", " \n\t")))
		if err != nil || got != root {
			rt.Fatalf("%x came back as %x: %v", root, got, err)
		}
	})
}

// Vectors of the BIP-39 reference implementation.
func TestWordsVectors(t *testing.T) {
	for last, fill := range map[string]byte{
		"abandon … art":  0x00,
		"legal … title":  0x7f,
		"letter … bless": 0x80,
		"zoo … vote":     0xff,
	} {
		root := Root(bytes.Repeat([]byte{fill}, 32))
		words, err := root.Words()
		if err != nil {
			t.Fatal(err)
		}
		list := strings.Fields(words)
		if got := list[0] + " … " + list[len(list)-1]; got != last || len(list) != WordCount {
			t.Errorf("%x spells %d words %q, want %q", fill, len(list), got, last)
		}
	}
}

func TestNewWordsDiffer(t *testing.T) {
	a, err := NewWords()
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewWords()
	if err != nil || a == b {
		t.Fatalf("same words twice: %v", err)
	}
	if _, err := RootFromWords(a); err != nil {
		t.Fatal(err)
	}
}

func TestWrongWordsAreExplained(t *testing.T) {
	good := strings.Fields(strings.Repeat("abandon ", 23) + "art")
	change := func(i int, word string) string {
		words := append([]string(nil), good...)
		words[i] = word
		return strings.Join(words, " ")
	}
	for _, test := range []struct{ words, says string }{
		{"", "need 24 words, got 0"},
		{strings.Join(good[:23], " "), "got 23"},
		{strings.Join(good, " ") + " art", "got 25"},
		{change(4, "secretpassword"), "word 5 is not on the list"},
		{change(4, "ability"), "checksum"},
		{change(23, "abandon"), "checksum"},
	} {
		_, err := RootFromWords(test.words)
		if !errors.Is(err, ErrWords) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%q: %v, want %q", test.words, err, test.says)
		}
		if err != nil && strings.Contains(err.Error(), "secretpassword") {
			t.Errorf("the error shows a word: %v", err)
		}
	}
}

func FuzzRootFromWords(f *testing.F) {
	f.Add(strings.Repeat("abandon ", 23) + "art")
	f.Add("zoo\x00zoo")
	f.Fuzz(func(t *testing.T, words string) {
		root, err := RootFromWords(words)
		if err != nil {
			return
		}
		again, err := root.Words()
		if err != nil || again != strings.Join(strings.Fields(strings.ToLower(words)), " ") {
			t.Fatalf("%q was read as %q: %v", words, again, err)
		}
	})
}
