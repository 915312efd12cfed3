package seal

import (
	"crypto/rand"
	"fmt"
	"strings"

	"github.com/cosmos/go-bip39"
)

// WordCount is the number of recovery words: 256 bits and 8 bits of checksum.
const WordCount = 24

// Root is the secret that the recovery words spell. Whoever has it has the
// volume; devices use it once, when they are set up, and never store it.
type Root [32]byte

// NewWords draws a new root and returns it as 24 words (BIP-39, English list)
// separated by single spaces. Show them once; they cannot be had again.
func NewWords() (string, error) {
	var root Root
	if _, err := rand.Read(root[:]); err != nil {
		return "", fmt.Errorf("seal: draw recovery words: %w", err)
	}
	return root.Words()
}

// Words returns the 24 words that spell the root.
func (r Root) Words() (string, error) {
	words, err := bip39.NewMnemonic(r[:])
	if err != nil {
		return "", fmt.Errorf("seal: spell recovery words: %w", err)
	}
	return words, nil
}

// RootFromWords reads what NewWords wrote. Case and white space do not matter.
// The error wraps ErrWords, names the position of a word that is not on the
// list but never the word itself, and says when the checksum tells that words
// are swapped or wrong.
func RootFromWords(words string) (Root, error) {
	list := strings.Fields(strings.ToLower(words))
	if len(list) != WordCount {
		return Root{}, fmt.Errorf("seal: %w: need %d words, got %d", ErrWords, WordCount, len(list))
	}
	for i, word := range list {
		if _, known := bip39.ReverseWordMap[word]; !known {
			return Root{}, fmt.Errorf("seal: %w: word %d is not on the list of 2048 words; check its spelling", ErrWords, i+1)
		}
	}
	// 256 bits of entropy, then 8 bits of checksum.
	entropy, err := bip39.MnemonicToByteArray(strings.Join(list, " "))
	if err != nil || len(entropy) != len(Root{})+1 {
		return Root{}, fmt.Errorf("seal: %w: every word is known but the checksum does not match; a word is wrong or two are swapped", ErrWords)
	}
	return Root(entropy[:32]), nil
}
