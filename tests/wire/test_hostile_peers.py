"""Peers that do not keep to the rules, over real sockets."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq

from tests.wire import zmtp
from tests.wire.links import WAIT_S, arrived, tensor
from tsqp.errors import ChannelClosed, PathRefused, ProtocolError, WorkerLost, WorkerUnreachable
from tsqp.wire.channel import MAX_TENSORS, Frames, Listener
from tsqp.wire.codec import MAX_CONTROL_BYTES
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.address import parse_address

TIB = 1 << 40


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(listen("tcp://127.0.0.1:0")) as listener:
        yield listener


@contextmanager
def raw_client(listener: Listener) -> Iterator[socket.socket]:
    """A TCP connection to a listener, before any handshake."""
    port = parse_address(listener.address).port
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as line:
        yield line


@contextmanager
def raw_worker(kind: str, directory: Path, sent: bytes) -> Iterator[str]:
    """A worker that shakes hands, sends these bytes and the end of the stream, and then says nothing. Its address."""
    server = socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET)
    server.settimeout(WAIT_S)
    server.bind(str(directory / "raw.sock") if kind == "ipc" else ("127.0.0.1", 0))
    server.listen()
    done = threading.Event()

    def serve() -> None:
        line, _ = server.accept()
        with line:
            line.settimeout(WAIT_S)
            line.sendall(zmtp.GREETING + zmtp.ready(b"ROUTER"))
            # Read all of the client's handshake: unread bytes would turn the end below into a reset.
            zmtp.read_until(line, b"DEALER")
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
            done.wait(WAIT_S)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"ipc://{directory}/raw.sock" if kind == "ipc" else f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        done.set()
        thread.join(WAIT_S)
        server.close()


def still_serves(listener: Listener) -> bool:
    with closing(connect(listener.address)) as channel:
        channel.send(Frames(b"good"))
        arrival = arrived(listener)
        listener.send(arrival, arrival.frames)
        return channel.receive(WAIT_S).control == b"good"


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_what_arrived_before_the_end_is_delivered_first(kind: str, private_dir: Path) -> None:
    replies = [zmtp.frame(b"%d" % n, more=True) + zmtp.frame(bytes(50_000)) for n in range(5)]
    with raw_worker(kind, private_dir, b"".join(replies)) as address, closing(connect(address)) as channel:
        for number in range(5):
            frames = channel.receive(WAIT_S)
            assert frames.control == b"%d" % number
            assert frames.tensors[0].nbytes == 50_000
        with pytest.raises(WorkerLost):
            channel.receive(WAIT_S)


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
@pytest.mark.parametrize(
    "sent",
    [
        zmtp.frame(b"", claimed=TIB),
        zmtp.frame(b"control", more=True) + zmtp.frame(b"", claimed=TIB),
        zmtp.frame(b"control", more=True) + zmtp.frame(b"half", claimed=100_000),
        zmtp.frame(b"control", more=True),
        b"\xff" * 100,
    ],
    ids=["control of 1 TiB", "tensor of 1 TiB", "tensor cut short", "tensor missing", "no frame at all"],
)
def test_broken_replies_end_the_channel(kind: str, sent: bytes, private_dir: Path) -> None:
    with raw_worker(kind, private_dir, sent) as address, closing(connect(address)) as channel:
        with pytest.raises(WorkerLost):
            channel.receive(WAIT_S)
        with pytest.raises(ChannelClosed):
            channel.receive(WAIT_S)


@pytest.mark.parametrize(
    "sent",
    [
        b"".join(zmtp.frame(b"", more=True) for _ in range(MAX_TENSORS + 1)) + zmtp.frame(b""),
        b"".join(zmtp.frame(b"", more=True) for _ in range(10_000)) + zmtp.frame(b""),
        zmtp.frame(bytes(MAX_CONTROL_BYTES + 1)),
    ],
    ids=["one tensor too many", "10,000 tensors", "control too large"],
)
def test_replies_over_the_limits_are_protocol_errors(sent: bytes, private_dir: Path) -> None:
    with raw_worker("tcp", private_dir, sent) as address, closing(connect(address)) as channel:
        with pytest.raises(ProtocolError):
            channel.receive(WAIT_S)
        with pytest.raises(ChannelClosed, match="ProtocolError"):
            channel.receive(WAIT_S)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(100),
        zmtp.GREETING + zmtp.ready(b"PUB"),
        zmtp.GREETING + zmtp.ready(b"DEALER") + zmtp.frame(b"", claimed=TIB),
        zmtp.GREETING + zmtp.ready(b"DEALER") + b"\xff" * 100,
        zmtp.GREETING + random.Random(7).randbytes(1000),
    ],
    ids=["HTTP", "another kind of socket", "call of 1 TiB", "no frame", "noise"],
)
def test_a_listener_drops_who_does_not_speak_its_protocol(listener: Listener, sent: bytes) -> None:
    with raw_client(listener) as line:
        line.sendall(sent)
        assert zmtp.read_to_end(line)
    assert still_serves(listener)


@pytest.mark.parametrize(
    "parts",
    [[b""] * (MAX_TENSORS + 2), [b""] * 5000, [bytes(MAX_CONTROL_BYTES + 1)]],
    ids=["one tensor too many", "5,000 tensors", "control too large"],
)
def test_a_listener_drops_messages_over_the_limits(listener: Listener, parts: list[bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger = 0
        client.connect(listener.address)
        client.send_multipart(parts)
        client.send(b"allowed")
        assert arrived(listener).frames.control == b"allowed"


def test_two_clients_that_claim_one_name_are_kept_apart(listener: Listener) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as first, context.socket(zmq.DEALER) as second:
        for client in (first, second):
            client.linger = 0
            client.routing_id = b"the same"
        first.connect(listener.address)
        first.send(b"call")
        arrival = arrived(listener)
        second.connect(listener.address)
        second.send(b"I am the first")
        assert listener.receive(0.1) is None
        listener.send(arrival, Frames(b"reply"))
        assert first.recv() == b"reply"


def test_a_client_that_reads_nothing_does_not_stop_the_others(listener: Listener) -> None:
    with closing(connect(listener.address)) as deaf:
        deaf.send(Frames(b"call"))
        arrival = arrived(listener)
        reply = Frames(b"reply", (tensor(bytes(1 << 16)),))
        for _ in range(3000):
            listener.send(arrival, reply)
        assert still_serves(listener)


def test_a_silent_server_is_unreachable_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WorkerUnreachable, match=address):
            connect(address, connect_timeout_s=0.2)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_a_client_connects_to_sockets_only(make: Callable[[Path], object], private_dir: Path) -> None:
    path = private_dir / "x.sock"
    make(path)
    with pytest.raises(PathRefused, match=r"is not a socket|is a symbolic link"):
        connect(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_client_refuses_a_socket_of_another_user(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        os.chown(path, 65_534, 65_534)
        with pytest.raises(PathRefused, match="another user"):
            connect(str(path))
