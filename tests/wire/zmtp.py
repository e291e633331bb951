"""Just enough of ZMTP 3.0 (rfc.zeromq.org/config/23) to be a peer that breaks its rules, byte by byte."""

from __future__ import annotations

import socket
import struct

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def ready(socket_type: bytes) -> bytes:
    """The command that ends a handshake without encryption."""
    body = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", len(socket_type)) + socket_type
    return bytes([4, len(body)]) + body


def frame(data: bytes, *, more: bool = False, claimed: int | None = None) -> bytes:
    """One frame; ``claimed`` is a length that is not that of the data."""
    return struct.pack(">BQ", 2 | more, len(data) if claimed is None else claimed) + data


def read_until(line: socket.socket, ending: bytes) -> bytes:
    """Bytes from a socket until ``ending`` has come, or the peer has closed."""
    data = b""
    while ending not in data and (piece := line.recv(65_536)):
        data += piece
    return data


def read_to_end(line: socket.socket) -> bool:
    """Whether the peer closed the connection (a timeout of the socket raises)."""
    try:
        while line.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return True
