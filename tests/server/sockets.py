"""A server on a thread of this process, and clients that are nothing but sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tests.commands import LIMIT_S
from tsqp.server.connection import Bounds, bounded


@contextlib.contextmanager
def served(app: ASGIApp, bounds: Bounds, max_head_bytes: int = 2048) -> Iterator[int]:
    """The port of an application that is served, with such bounds of its connections."""
    config = uvicorn.Config(
        app,
        http=bounded(bounds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=max_head_bytes,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)
            assert not thread.is_alive()


class Client:
    """One connection."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect(("127.0.0.1", port))

    def send(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        whole = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                whole += piece
        return whole

    def until(self, mark: bytes) -> bytes:
        """All that comes up to ``mark``."""
        whole = b""
        while mark not in whole:
            piece = self.socket.recv(1)
            assert piece, whole
            whole += piece
        return whole

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def parsed(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]
