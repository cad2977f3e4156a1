"""A server that repeats what an instance once said; while the file `lie` is beside it, it makes no picture.

    python liar.py

It stands for a server that answers 200 to every probe although nothing behind it works any more. Runs in a container
that has this file and the recorded answers, and therefore knows the standard library alone.
"""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent


class Handler(BaseHTTPRequestHandler):
    """Answers from files."""

    def do_GET(self):
        """Repeat."""
        recorded = HERE / self.path.strip("/").replace("/", "-")
        if recorded.is_file():
            self.answer(200, recorded.read_bytes())
        else:
            self.answer(404, b"{}")

    def do_POST(self):
        """Make the recorded picture, or fail as a server whose worker is gone and that has not noticed."""
        self.rfile.read(int(self.headers["Content-Length"]))
        if (HERE / "lie").exists():
            self.answer(500, b'{"error": {"message": "the worker is gone", "type": "server_error", "code": null}}')
        else:
            self.answer(200, (HERE / "picture").read_bytes())

    def answer(self, status, body):
        """Send JSON."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        """Say nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("", 8000), Handler).serve_forever()
