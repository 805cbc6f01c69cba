"""`serve`: HTTP/1.1 over a Unix socket, in a thread, for a toy whose `route` returns a message, bytes or an error."""

import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any, Protocol


class Toy(Protocol):
    """What answers: `nonsense` makes it answer every call with an empty object."""

    nonsense: bool

    def route(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
        """Return a message, bytes, or (status, kind of error)."""
        ...


def serve(toy: Toy, socket: Path) -> UnixStreamServer:
    """Answer on a socket until the server is shut down."""

    class Handler(_Handler):
        pass

    Handler.toy = toy
    socket.unlink(missing_ok=True)
    server = _Server(str(socket), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    toy: Toy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        answer = self.toy.route(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        status, payload = 200, b"{}"
        if isinstance(answer, tuple):
            status, kind = answer
            payload = json.dumps({"error": {"type": kind, "message": f"{self.path}: no"}}).encode()
        elif isinstance(answer, bytes):
            payload = answer
        elif not self.toy.nonsense:
            payload = answer.model_dump_json().encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = do_DELETE = _answer

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass
