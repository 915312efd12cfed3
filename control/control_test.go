package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs"
)

// serve opens a new volume, far down in directories, and serves it.
func serve(t testing.TB, mount Mount) (dir string, client *Client) {
	t.Helper()
	dir, client, _ = serving(t, mount)
	return dir, client
}

func serving(t testing.TB, mount Mount) (dir string, client *Client, server *Server) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), strings.Repeat("directory-", 12), "volume") // longer than a socket's path may be
	if _, err := defs.Init(defs.InitOptions{Dir: dir, Name: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context(), dir); !errors.Is(err, ErrNotServed) {
		t.Fatalf("dial before serve: %v", err)
	}
	// What a crash leaves behind is in nobody's way.
	if err := os.WriteFile(filepath.Join(dir, socketFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	volume, err := defs.New(t.Context(), defs.Options{Dir: dir, Listen: []string{"/ip4/127.0.0.1/tcp/0"}})
	if err != nil {
		t.Fatal(err)
	}
	server, err = Serve(dir, volume, mount)
	if err != nil {
		t.Fatal(err)
	}
	client, err = Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		if err := errors.Join(server.Close(), volume.Close(context.Background())); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(dir, socketFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	return dir, client, server
}

func TestSocketIsForItsOwnerOnly(t *testing.T) {
	dir, _ := serve(t, nil)
	info, err := os.Stat(filepath.Join(dir, socketFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, error %v", info.Mode(), err)
	}
}

func TestUploadAndDownload(t *testing.T) {
	_, c := serve(t, nil)
	for _, size := range []int{0, 1, 3<<20 + 17} {
		want := bytes.Repeat([]byte("defs"), size/4+1)[:size]
		id, err := c.Upload(t.Context(), "name", bytes.NewReader(want))
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if err := c.Download(t.Context(), id, &got); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Fatalf("%d bytes: got %d, error %v", size, got.Len(), err)
		}
	}
	st, err := c.Status(t.Context())
	if err != nil || st.Schema != Schema || st.Volume != "test" || st.Mounted || st.Bytes.Journaled != 3<<20+18 {
		t.Errorf("status %+v, error %v", st, err)
	}
}

func TestErrorsHaveCodes(t *testing.T) {
	_, c := serve(t, nil)
	_, upload := c.Upload(t.Context(), "", strings.NewReader("x"))
	_, path := c.Inspect(t.Context(), url.Values{"path": {"/no/such/file"}})
	_, stripe := c.Inspect(t.Context(), url.Values{"stripe": {"xyz"}})
	_, unknown := c.Inspect(t.Context(), url.Values{"stripe": {strings.Repeat("0", 32)}})
	for what, e := range map[string]struct {
		err  error
		want Code
	}{
		"download":       {c.Download(t.Context(), "zzzz", io.Discard), CodeNotFound},
		"unmount":        {c.Unmount(t.Context()), CodeInvalid},
		"upload":         {upload, CodeInvalid},
		"path":           {path, CodeNotFound},
		"stripe":         {stripe, CodeInvalid},
		"unknown stripe": {unknown, CodeNotFound},
	} {
		if e.err == nil || CodeOf(e.err) != e.want {
			t.Errorf("%s: %v has code %q, want %q", what, e.err, CodeOf(e.err), e.want)
		}
	}
}

func TestInspectFile(t *testing.T) {
	_, c := serve(t, nil)
	if _, err := c.Upload(t.Context(), "name", strings.NewReader("content")); err != nil {
		t.Fatal(err)
	}
	found, err := c.Inspect(t.Context(), url.Values{"path": {"/uploads/name"}})
	if err != nil || found.File == nil || found.File.Bytes != 7 || len(found.File.Extents) != 1 || !found.File.Extents[0].Local {
		t.Fatalf("%+v, error %v", found.File, err)
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	_, c := serve(t, nil)
	if _, err := c.Upload(t.Context(), "name", strings.NewReader("content")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := c.WaitDurable(ctx, func(st Status) {
		if st.Bytes.Durable == 0 {
			cancel() // no node will ever come
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

type busyMount struct{}

func (busyMount) Mountpoint() string { return "/mnt" }
func (busyMount) Unmount() error     { return errors.New("in use") }

func TestUnmountOfABusyMount(t *testing.T) {
	_, c := serve(t, busyMount{})
	if err := c.Unmount(t.Context()); CodeOf(err) != CodeBusy || !strings.Contains(err.Error(), "in use") {
		t.Errorf("error %v", err)
	}
	if st, err := c.Status(t.Context()); err != nil || !st.Mounted || st.Mountpoint != "/mnt" {
		t.Errorf("status %+v, error %v", st, err)
	}
}

func TestCloseEndsRequests(t *testing.T) {
	dir := t.TempDir()
	if _, err := defs.Init(defs.InitOptions{Dir: dir, Name: "test"}); err != nil {
		t.Fatal(err)
	}
	volume, err := defs.New(t.Context(), defs.Options{Dir: dir, Listen: []string{"/ip4/127.0.0.1/tcp/0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer volume.Close(context.Background())
	server, err := Serve(dir, volume, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Upload(t.Context(), "name", strings.NewReader("content")); err != nil {
		t.Fatal(err)
	}
	waiting, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		ended <- c.WaitDurable(t.Context(), func(Status) {
			select {
			case waiting <- struct{}{}:
			default:
			}
		})
	}()
	<-waiting
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the wait says that it is durable")
		}
	case <-time.After(10 * time.Second):
		t.Error("the wait goes on")
	}
}

func TestReplyIsBounded(t *testing.T) {
	c := &Client{http: http.Client{Transport: endless{}}}
	if _, err := c.Status(t.Context()); err == nil {
		t.Error("an endless reply is taken")
	}
}

// endless replies with a JSON string that never ends.
type endless struct{}

func (endless) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(io.MultiReader(strings.NewReader(`"`), zeros{})), Request: r}, nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '0'
	}
	return len(p), nil
}
