package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
)

// replyBytesMax bounds a JSON reply.
const replyBytesMax = 64 << 20

// ErrNotServed: no process has the volume open.
var ErrNotServed = errors.New("no process has the volume open")

// Client talks to the process that has a volume open.
type Client struct {
	http http.Client
}

// Dial returns a client of the volume or node in dir, or ErrNotServed.
func Dial(ctx context.Context, dir string) (*Client, error) {
	conn, err := connect(ctx, dir)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrNotServed
	}
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	conn.Close()
	c := &Client{}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return connect(ctx, dir) },
	}
	return c, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for the volume's figures.
func (c *Client) Status(ctx context.Context) (out Status, err error) {
	return out, c.get(ctx, "status", nil, &out)
}

// Peers asks for the pool.
func (c *Client) Peers(ctx context.Context) (out Peers, err error) {
	return out, c.get(ctx, "peers", nil, &out)
}

// Node asks a node's process for its figures.
func (c *Client) Node(ctx context.Context) (out Node, err error) {
	return out, c.get(ctx, "node", nil, &out)
}

// Inspect asks for a file (ino, or path from the volume's root), a stripe, or
// a shard (stripe and shard).
func (c *Client) Inspect(ctx context.Context, what url.Values) (out Inspection, err error) {
	return out, c.get(ctx, "inspect", what, &out)
}

// DropCache removes every clean local byte, but, without force, for those that
// the pool cannot give back now.
func (c *Client) DropCache(ctx context.Context, force bool) (out Dropped, err error) {
	query := url.Values{}
	if force {
		query.Set("force", "1")
	}
	return out, c.ask(ctx, http.MethodPost, "cache/drop", query, nil, &out)
}

// Unmount ends the mount. The process that served it closes the volume after.
func (c *Client) Unmount(ctx context.Context) error {
	return c.ask(ctx, http.MethodPost, "unmount", nil, nil, &Status{})
}

// Upload stores a file of its own and returns its id.
func (c *Client) Upload(ctx context.Context, name string, r io.Reader) (string, error) {
	var out Uploaded
	err := c.ask(ctx, http.MethodPost, "upload", url.Values{"name": {name}}, r, &out)
	return out.ID, err
}

// Download writes the file with an id to w.
func (c *Client) Download(ctx context.Context, id string, w io.Writer) error {
	rep, err := c.do(ctx, http.MethodGet, "download/"+url.PathEscape(id), nil, nil)
	if err != nil {
		return err
	}
	defer rep.Body.Close()
	if _, err := io.Copy(w, rep.Body); err != nil {
		return fmt.Errorf("download %s: %w", id, err)
	}
	return nil
}

// WaitDurable returns when everything acknowledged before is durable.
// progress, if not nil, is called with figures now and then.
func (c *Client) WaitDurable(ctx context.Context, progress func(Status)) error {
	rep, err := c.do(ctx, http.MethodPost, "wait", nil, nil)
	if err != nil {
		return err
	}
	defer rep.Body.Close()
	lines := bufio.NewScanner(rep.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var p Progress
		if err := json.Unmarshal(lines.Bytes(), &p); err != nil {
			return fmt.Errorf("wait: %w", err)
		}
		if p.Status != nil && progress != nil {
			progress(*p.Status)
		}
		if p.Done {
			return nil
		}
		if p.Error != "" {
			return &Error{p.Code, p.Error}
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("wait: %w", err)
	}
	return errors.New("wait: the process that has the volume open has ended")
}

// Drain empties the node, for as long as ctx lasts, and returns what has moved.
// progress, if not nil, is called now and then.
func (c *Client) Drain(ctx context.Context, progress func(Drain)) (last Drain, err error) {
	rep, err := c.do(ctx, http.MethodPost, "drain", nil, nil)
	if err != nil {
		return last, err
	}
	defer rep.Body.Close()
	lines := bufio.NewScanner(rep.Body)
	for lines.Scan() {
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			return last, fmt.Errorf("drain: %w", err)
		}
		switch {
		case last.Error != "":
			return last, &Error{CodeFailed, last.Error}
		case last.Done:
			return last, nil
		case progress != nil:
			progress(last)
		}
	}
	if ctx.Err() != nil {
		return last, ctx.Err()
	}
	if err := lines.Err(); err != nil {
		return last, fmt.Errorf("drain: %w", err)
	}
	return last, errors.New("drain: the node's process has ended")
}

func (c *Client) get(ctx context.Context, what string, query url.Values, out any) error {
	return c.ask(ctx, http.MethodGet, what, query, nil, out)
}

func (c *Client) ask(ctx context.Context, method, what string, query url.Values, body io.Reader, out any) error {
	rep, err := c.do(ctx, method, what, query, body)
	if err != nil {
		return err
	}
	defer rep.Body.Close()
	if err := json.NewDecoder(io.LimitReader(rep.Body, replyBytesMax)).Decode(out); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// do sends a request and turns an error reply into an Error.
func (c *Client) do(ctx context.Context, method, what string, query url.Values, body io.Reader) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "defs", Path: "/v1/" + what, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	rep, err := c.http.Do(req)
	if err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("%s: the process that has the volume open does not answer: %w", what, ctx.Err())
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if rep.StatusCode == http.StatusOK {
		return rep, nil
	}
	defer rep.Body.Close()
	var failed errorReply
	if err := json.NewDecoder(io.LimitReader(rep.Body, replyBytesMax)).Decode(&failed); err != nil {
		return nil, fmt.Errorf("%s: %s", what, rep.Status)
	}
	return nil, &Error{failed.Code, failed.Error}
}
