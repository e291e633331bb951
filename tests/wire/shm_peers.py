"""Either end of a shared-memory connection without its checks, to break the rules with."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.wire.links import WAIT_S
from tsqp.wire.channel import Channel
from tsqp.wire.transport import connect
from tsqp.wire.transport.shm.channel import ShmChannel
from tsqp.wire.transport.shm.packets import (
    SHM_VERSION,
    Answer,
    Opening,
    Request,
    decode_places,
    encode_answer,
    encode_opening,
    split_request,
)
from tsqp.wire.transport.shm.segment import SEALS

ARENA_BYTES = 1 << 20


def decode_request(packet: bytes) -> Request:
    """Raises ProtocolError."""
    sequence, places, control = split_request(packet)
    return Request(sequence, control, *decode_places(places))


def taken_bytes(channel: Channel) -> int:
    """Bytes of the arena that tensors, calls under way and replies still hold. Raises ChannelClosed."""
    assert isinstance(channel, ShmChannel)
    channel._check_alive()
    return channel._arena.taken_bytes


class RawWorker:
    """Accepts one channel, takes its arena, and then does what the test says."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        line.settimeout(WAIT_S)
        _, fds, _, _ = socket.recv_fds(line, 8192, 1)
        (self.fd,) = fds
        self.memory = mmap.mmap(self.fd, 0)

    def next_request(self) -> Request:
        return decode_request(self.line.recv(8192))

    def answer(self, sequence: int, control: bytes = b"") -> None:
        self.line.send(encode_answer(Answer(sequence, control)))

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)
        self.line.close()


@contextmanager
def raw_worker(directory: Path, **options: Any) -> Iterator[tuple[RawWorker, ShmChannel]]:
    """A worker without rules, and the channel of a trusted side that is connected to it."""
    path = directory / "raw.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        server.listen()
        channel = connect(f"shm://{path}", arena_bytes=ARENA_BYTES, **options)
        assert isinstance(channel, ShmChannel)
        worker = RawWorker(server.accept()[0])
        try:
            yield worker, channel
        finally:
            channel.close()
            worker.close()


@contextmanager
def raw_client(address: str) -> Iterator[socket.socket]:
    """A connection to a listener, before its opening."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.settimeout(WAIT_S)
        line.connect(address.removeprefix("shm://"))
        yield line


def opening(path: str | None = None, version: int = SHM_VERSION) -> bytes:
    return encode_opening(Opening(version, path))


def memfd(size: int = ARENA_BYTES, seals: int = SEALS) -> int:
    fd = os.memfd_create("tsqp-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def descriptors_of(fd: int) -> int:
    """How many this process has of the file of ``fd``; those of other files come and go with other tests."""
    file = os.fstat(fd)
    count = 0
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the directory itself is closed by now
            count += os.path.samestat(os.fstat(int(one.name)), file)
    return count


def read_to_end(line: socket.socket) -> list[bytes]:
    """All packets until the peer closes; a timeout of the socket raises."""
    packets = []
    try:
        while packet := line.recv(8192):
            packets.append(packet)
    except ConnectionResetError:
        pass
    return packets
