package control

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

// FuzzRequest sends what a program of the same user may send to the socket.
func FuzzRequest(f *testing.F) {
	_, _, server := serving(f, nil)
	f.Add("GET", "inspect", "path=/a/b", []byte{})
	f.Add("GET", "inspect", "ino=1&stripe=&shard=0", []byte{})
	f.Add("GET", "inspect", "stripe=000102030405060708090a0b0c0d0e0f&shard=-1", []byte{})
	f.Add("GET", "download/zzzzzzzzzzzzzzzzzzzz", "", []byte{})
	f.Add("POST", "upload", "name=..%2f..%2fx", []byte("content"))
	f.Add("POST", "cache/drop", "", []byte{})
	f.Add("POST", "unmount", "", []byte{})
	f.Fuzz(func(t *testing.T, method, what, query string, body []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond) // of a wait for peers that there are not
		defer cancel()
		req := (&http.Request{
			Method: method, URL: &url.URL{Path: "/v1/" + what, RawQuery: query}, Host: "defs", Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)),
		}).WithContext(ctx)
		rep := httptest.NewRecorder()
		defer func() {
			if p := recover(); p != nil && p != http.ErrAbortHandler {
				panic(p)
			}
		}()
		server.http.Handler.ServeHTTP(rep, req)
	})
}

// fixed is a server that always replies the same.
type fixed struct {
	status int
	body   []byte
}

func (f fixed) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: f.status, Status: "status", Body: io.NopCloser(bytes.NewReader(f.body))}, nil
}

// FuzzReply reads what a process that is not ours may reply at the socket.
func FuzzReply(f *testing.F) {
	f.Add(200, []byte(`{"schema":1,"tasks":[{}],"file":{"extents":[{"offset":-1}]},"peers":null}`))
	f.Add(200, []byte("{\"status\":{}}\n{\"done\":true}\n"))
	f.Add(200, []byte("{\"error\":\"x\",\"code\":\"busy\"}"))
	f.Add(500, []byte(`{"error":"x","code":"no_space"}`))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		c := &Client{http: http.Client{Transport: fixed{status, body}}}
		ctx := t.Context()
		_, _ = c.Status(ctx)
		_, _ = c.Peers(ctx)
		_, _ = c.Inspect(ctx, nil)
		_, _ = c.Upload(ctx, "name", strings.NewReader("x"))
		err := c.WaitDurable(ctx, func(Status) {})
		if err == nil && !bytes.Contains(body, []byte("rue")) {
			t.Fatal("durable without a word of it")
		}
		var out bytes.Buffer
		if err := c.Download(ctx, "id", &out); err == nil && !bytes.Equal(out.Bytes(), body) {
			t.Fatal("other bytes were taken")
		}
	})
}
