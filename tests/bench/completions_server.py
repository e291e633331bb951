"""A server of the completions API that says what it was told to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Script:
    """How it answers: a status, and lines of a stream.

    ``asked``: bodies of the requests that came; ``clients``: the port of each, one for those of one connection.
    """

    status: int = 200
    lines: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    clients: list[int] = field(default_factory=list)
    address: str = ""


def piece(text: str, **more: Any) -> str:
    """An event with something of an answer."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text}], **more})}"


def usage(tokens: int) -> str:
    """The event at the end."""
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}"


@contextlib.contextmanager
def speaking(script: Script) -> Iterator[Script]:
    """The server, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections

        def do_POST(self) -> None:
            script.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            script.clients.append(self.client_address[1])
            body = "".join(f"{line}\r\n\r\n" for line in script.lines).encode()
            self.send_response(script.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            script.address = f"http://127.0.0.1:{server.server_port}"
            yield script
        finally:
            server.shutdown()
            thread.join()
