"""Shared memory against a side that breaks the rules: an error on the other side, never a crash, a hang or a leak."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.wire.links import WAIT_S, arrived
from tests.wire.shm_peers import (
    ARENA_BYTES,
    decode_request,
    descriptors_of,
    memfd,
    opening,
    raw_client,
    raw_worker,
    read_to_end,
    taken_bytes,
)
from tsqp.errors import ChannelClosed, ChannelError, ProtocolError, WorkerLost
from tsqp.wire.channel import Arrival, Channel, Departure, Frames, Listener
from tsqp.wire.codec import MAX_CONTROL_BYTES
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.shm.packets import (
    NO_BYTES,
    OPENING,
    Answer,
    Region,
    Request,
    encode_answer,
    encode_request,
)
from tsqp.wire.transport.shm.segment import MAX_ARENA_BYTES
from tsqp.wire.transport.shm.unix import user_of

pack = msgspec.msgpack.encode


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_arenas() -> set[tuple[str, ...]]:
    """Address range, device, inode and name of each arena in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {(fields[0], *fields[3:]) for fields in map(str.split, lines) if "arena" in fields[-1]}


def receive_all(channel: Channel, tensors: Sequence[int] = ()) -> None:
    """Receive for ever, replies with tensors of these sizes."""
    while True:
        assert [tensor.nbytes for tensor in channel.receive(WAIT_S).tensors] == [*tensors]


# A worker without rules


@pytest.mark.parametrize(
    "packet",
    [
        b"\xc1",
        bytes(7),
        encode_answer(Answer(2, b"")),
        encode_answer(Answer(2**64 - 1, b"")),
        encode_answer(Answer(1, b""))[::-1],
        pack([1, b"a packet of version 1"]),
        encode_answer(Answer(1, bytes(MAX_CONTROL_BYTES + 1))),
        bytes(100_000),
        encode_answer(Answer(1, bytes(100_000))),
    ],
    ids=lambda packet: packet[:12].hex(),
)
def test_a_packet_that_is_no_answer_ends_the_channel(packet: bytes, private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        channel.send(Frames(b"call"), 1000)
        worker.line.send(packet)
        with pytest.raises(ProtocolError):
            channel.receive(WAIT_S)
        with pytest.raises(ChannelClosed, match="ProtocolError"):
            channel.receive(WAIT_S)


@pytest.mark.parametrize("sequences", [(1, 1), (OPENING, OPENING), (0, 1, 2, 1), (3,)], ids=str)
def test_what_is_not_under_way_cannot_be_answered(sequences: tuple[int, ...], private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        for _ in range(2):
            channel.send(Frames(b"call"))
        for sequence in sequences:
            worker.answer(sequence)
        with pytest.raises(ProtocolError, match="not under way"):
            receive_all(channel)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packets=st.lists(st.binary(max_size=200) | st.integers(0, 3).map(lambda n: encode_answer(Answer(n, b"")))))
def test_any_packets_are_answers_or_an_error(packets: list[bytes], private_dir: Path) -> None:
    with tempfile.TemporaryDirectory(dir=private_dir) as directory, raw_worker(Path(directory)) as (worker, channel):
        channel.send(Frames(b"call"), 8)
        with suppress(BrokenPipeError):
            for packet in packets:
                worker.line.send(packet)
        worker.line.shutdown(socket.SHUT_WR)
        with pytest.raises((ProtocolError, WorkerLost)):
            receive_all(channel, tensors=[8])


def test_a_worker_that_scribbles_over_everything_changes_bytes_and_nothing_else(private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        worker.answer(OPENING)
        for fill in (b"\xff", b"\x00", b"\x80"):
            place = channel.reserve(1000)
            place[:] = b"p" * 1000
            channel.send(Frames(b"call", (place,)), 5000)
            request = worker.next_request()
            worker.memory[:] = fill * ARENA_BYTES
            worker.answer(request.sequence, b"done")
            (product,) = channel.receive(WAIT_S).tensors
            assert bytes(product) == fill * 5000
            taken = taken_bytes(channel)
            worker.memory[:] = os.urandom(ARENA_BYTES)
            assert taken_bytes(channel) == taken
            assert channel.reserve(100).nbytes == 100


def test_a_worker_cannot_take_the_memory_away(private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        place = channel.reserve(ARENA_BYTES // 2)
        for size in (0, ARENA_BYTES // 2, 2 * ARENA_BYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(worker.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(worker.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        place[:] = bytes(place.nbytes)  # it can still be touched


def test_descriptors_from_a_worker_are_not_taken(private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        channel.send(Frames(b"call"))
        before = descriptors_of(worker.fd)
        socket.send_fds(worker.line, [encode_answer(Answer(1, b"done"))], [worker.fd] * 100)
        assert channel.receive(WAIT_S).control == b"done"
        assert descriptors_of(worker.fd) == before


def test_what_was_answered_before_the_end_is_delivered_first(private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        for _ in range(3):
            channel.send(Frames(b"call"), 10)
        worker.answer(OPENING)
        for number in range(3):
            worker.answer(3 - number, b"%d" % number)
        worker.line.close()  # with three calls unread, which makes it a reset
        for number in range(3):
            assert channel.receive(WAIT_S).control == b"%d" % number
        with pytest.raises(WorkerLost):
            channel.receive(WAIT_S)


def test_a_refusal_is_shown_without_its_control_characters(private_dir: Path) -> None:
    with raw_worker(private_dir) as (worker, channel):
        worker.answer(OPENING, b"no\x1b[31m\n" + b"x" * 4000)
        with pytest.raises(WorkerLost, match="refused") as caught:
            channel.receive(WAIT_S)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_what_a_worker_said_before_it_left_is_told(private_dir: Path) -> None:
    """Also by a call that is sent after that: the packet cannot be sent, but the refusal is there to be read."""
    with raw_worker(private_dir) as (worker, channel):
        worker.line.send(encode_answer(Answer(OPENING, b"no memory")))
        worker.line.close()
        with pytest.raises(WorkerLost, match="refused the shared memory: b'no memory'"):
            channel.send(Frames(b"call"), 8)


def test_a_worker_that_reads_nothing_is_noticed(private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.wire.transport.shm.channel.SEND_TIMEOUT_S", 0.05)

    def send_for_ever(channel: Any) -> None:
        while True:
            channel.send(Frames(b"call"))

    with raw_worker(private_dir) as (_, channel), pytest.raises(ChannelError, match="stalled"):
        send_for_ever(channel)


# A client without rules


@pytest.fixture
def listener(private_dir: Path) -> Iterator[Listener]:
    with closing(listen(f"shm://{private_dir}/worker.sock")) as listener:
        yield listener


def still_serves(listener: Listener) -> bool:
    with closing(connect(listener.address)) as channel:
        channel.send(Frames(b"good"))
        listener.send(arrived(listener), Frames(b"fine"))
        return channel.receive(WAIT_S).control == b"fine"


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Whatever opens a file or a socket in here is refused it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_client_for_whom_there_is_no_descriptor_is_turned_away(listener: Listener) -> None:
    """Left in the queue, it would be announced again and again, for as long as it waits."""
    with raw_client(listener.address) as first, raw_client(listener.address) as second:
        with no_more_descriptors():
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            for _ in range(2):
                assert listener.receive(0.0) is None
        assert first.recv(1) == second.recv(1) == b""
        assert still_serves(listener)


def assert_shut_out(listener: Listener, line: socket.socket, complaint: str) -> None:
    """The connection ends, with a reason where the client shook hands, and is reported as ended."""
    assert isinstance(listener.receive(WAIT_S), Departure)
    packets = read_to_end(line)
    assert any(complaint in str(packet) for packet in packets) or not complaint
    assert still_serves(listener)


OPENINGS: dict[str, tuple[Callable[[], tuple[bytes, list[int]]], str]] = {
    "garbage": (lambda: (b"\xc1", []), "not a valid"),
    "a request": (lambda: (encode_request(Request(1, b"")), []), "not a valid"),
    "another version": (lambda: (opening(version=99), [memfd()]), "version 99"),
    "no descriptor": (lambda: (opening(), []), "one descriptor or one file"),
    "a descriptor and a file": (lambda: (opening("/tmp/x"), [memfd()]), "one descriptor or one file"),
    "unsealed": (lambda: (opening(), [memfd(seals=0)]), "not sealed"),
    "growable": (lambda: (opening(), [memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)]), "not sealed"),
    "shrinkable": (lambda: (opening(), [memfd(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)]), "not sealed"),
    "empty": (lambda: (opening(), [memfd(0)]), "0 bytes"),
    "too small": (lambda: (opening(), [memfd(100)]), "100 bytes"),
    "too large": (lambda: (opening(), [memfd(MAX_ARENA_BYTES + 4096)]), "bytes"),
    "a pipe": (lambda: (opening(), [os.pipe()[0]]), "not a memfd"),
    "a directory": (lambda: (opening(), [os.open("/tmp", os.O_RDONLY)]), "not a memfd"),
    "read-only": (lambda: (opening(), [os.open(f"/proc/self/fd/{memfd()}", os.O_RDONLY)]), "cannot be mapped"),
    "a file that is not there": (lambda: (opening("/nowhere/x"), []), "cannot be opened"),
    "a path with a zero": (lambda: (opening("/tmp/\0"), []), "cannot be opened"),
}


@pytest.mark.parametrize("name", OPENINGS)
def test_an_unsound_arena_is_refused(name: str, listener: Listener) -> None:
    make, complaint = OPENINGS[name]
    packet, fds = make()
    try:
        with raw_client(listener.address) as line:
            socket.send_fds(line, [packet], fds)
            assert_shut_out(listener, line, complaint)
    finally:
        for fd in fds:
            os.close(fd)


def make_file(path: Path, mode: int = 0o600) -> None:
    path.touch(mode)
    path.chmod(mode)
    os.truncate(path, ARENA_BYTES)


def make_open(path: Path) -> None:
    make_file(path, 0o640)


def make_link(path: Path) -> None:
    make_file(path.with_name("target"))
    path.symlink_to(path.with_name("target"))


def make_in_open_directory(path: Path) -> None:
    make_file(path)
    path.parent.chmod(0o777)


def make_of_another_user(path: Path) -> None:
    make_file(path)
    os.chown(path, 65_534, 65_534)


@pytest.mark.parametrize(
    "make",
    [
        make_open,
        make_link,
        os.mkfifo,
        Path.mkdir,
        make_in_open_directory,
        pytest.param(make_of_another_user, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root")),
    ],
)
def test_an_unsafe_arena_file_is_refused(make: Callable[[Path], object], private_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "arenas" / "x.arena"
    path.parent.mkdir(mode=0o700)
    make(path)
    with (
        closing(listen(f"shm://{private_dir}/worker.sock")) as listener,
        raw_client(listener.address) as line,
    ):
        line.send(opening(str(path)))
        assert_shut_out(listener, line, "an arena that")


def numbers(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}Q", *words)


def test_a_request_is_its_numbers_and_its_control_frame() -> None:
    request = Request(7, b"control", (Region(64, 10), Region(128, 20)), Region(192, 30))
    packet = encode_request(request)
    assert packet == numbers(7, 2, 64, 10, 128, 20, 192, 30) + b"control"
    assert decode_request(packet) == request
    assert encode_request(Request(1, b"")) == numbers(1, 0, 0, 0, 0, 0, 0, 0)


@given(packet=st.binary(max_size=200))
def test_any_packet_is_one_request_or_an_error(packet: bytes) -> None:
    try:
        request = decode_request(packet)
    except ProtocolError:
        return
    assert encode_request(request) == packet


END = ARENA_BYTES
REQUESTS: dict[str, bytes] = {
    "garbage": b"\xc1",
    "just past the end": encode_request(Request(1, b"", (Region(END - 10, 11),), NO_BYTES)),
    "far outside": encode_request(Request(1, b"", (Region(2**61, 10),), NO_BYTES)),
    "huge": encode_request(Request(1, b"", (Region(0, 2**61),), NO_BYTES)),
    "together past the end": encode_request(Request(1, b"", (Region(2**61, 2**61),), NO_BYTES)),
    "a reply past the end": encode_request(Request(1, b"", (), Region(END, 1))),
    "a reply over its input": encode_request(Request(1, b"", (Region(0, 100),), Region(99, 100))),
    "a negative offset": numbers(1, 1, -1 % 2**64, 10, 0, 0, 0, 0),
    "a negative size": numbers(1, 1, 100, -10 % 2**64, 0, 0, 0, 0),
    "together beyond 64 bits": numbers(1, 1, 2**64 - 1, 2**64 - 1, 0, 0, 0, 0),
    "three tensors": numbers(1, 3, 0, 1, 1, 1, 2, 1),
    "very many tensors": numbers(1, 2**64 - 1, 0, 1, 1, 1, 2, 1),
    "a tensor that is not counted": numbers(1, 1, 0, 1, 1, 1, 2, 1),
    "a place that is not counted": numbers(1, 0, 1, 0, 0, 0, 0, 0),
    "a number too few": numbers(1, 0, 0, 0, 0, 0, 0),
    "a product in the middle of its input": numbers(1, 1, 0, 100, 0, 0, 50, 10),
    "an empty product in the middle of its input": numbers(1, 1, 0, 100, 0, 0, 50, 0),
    "too much control": encode_request(Request(1, bytes(MAX_CONTROL_BYTES + 1))),
    "a packet of version 1": pack([1, b"", [], None]),
    "a second opening": opening(),
    "100 kB": bytes(100_000),
    "a tensor over the limit": encode_request(Request(1, b"", (Region(0, 600_000),), NO_BYTES)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_unsound_request_costs_its_connection_and_no_other(name: str, private_dir: Path) -> None:
    fd = memfd()
    try:
        with (
            closing(listen(f"shm://{private_dir}/worker.sock", max_frame_bytes=500_000)) as listener,
            raw_client(listener.address) as line,
        ):
            socket.send_fds(line, [opening()], [fd])
            line.send(encode_request(Request(1, b"sound", (Region(END - 10, 10),), Region(0, 1))))
            arrival = arrived(listener)
            assert (arrival.frames.control, arrival.frames.tensors[0].nbytes) == (b"sound", 10)
            line.send(REQUESTS[name])
            assert_shut_out(listener, line, "")
            listener.send(arrival, Frames(b"too late"))
    finally:
        os.close(fd)


def test_a_descriptor_sent_later_is_not_taken(listener: Listener) -> None:
    fd = memfd()
    with raw_client(listener.address) as line:
        socket.send_fds(line, [opening()], [fd])
        assert not isinstance(listener.receive(0.01), Arrival)
        before = descriptors_of(fd)
        socket.send_fds(line, [encode_request(Request(1, b"call"))], [fd] * 50)
        assert arrived(listener).frames.control == b"call"
        assert descriptors_of(fd) == before
    os.close(fd)


def test_a_client_that_reads_nothing_loses_its_connection(listener: Listener) -> None:
    fd = memfd()
    with raw_client(listener.address) as deaf:
        socket.send_fds(deaf, [opening()], [fd])
        deaf.setblocking(False)
        departed = False
        while not departed:
            with suppress(BlockingIOError, BrokenPipeError):
                deaf.send(encode_request(Request(1, b"call")))
            event = listener.receive(WAIT_S)
            if isinstance(event, Arrival):
                listener.send(event, Frames(bytes(MAX_CONTROL_BYTES)))
            departed = isinstance(event, Departure)
    assert still_serves(listener)
    os.close(fd)


def test_a_client_that_never_opens_does_not_stop_the_others(listener: Listener) -> None:
    with raw_client(listener.address), raw_client(listener.address):
        assert still_serves(listener)


# Other users, other processes


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        assert user_of(one) == user_of(other) == os.geteuid()


STRANGER = """
import os, socket, sys
uid, path = int(sys.argv[1]), sys.argv[2]
os.setgroups([]); os.setgid(uid); os.setuid(uid)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
    line.settimeout(20)
    line.connect(path)
    print("in", flush=True)
    try:
        line.send(b"garbage")
        print(len(line.recv(1)))
    except (ConnectionResetError, BrokenPipeError):
        print(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("uid", "bytes_read"), [(0, 1), (65_534, 0)])
def test_another_user_who_reaches_the_socket_is_shut_out(uid: int, bytes_read: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own directories let no stranger in
        Path(directory).chmod(0o755)
        path = Path(directory) / "worker.sock"
        with closing(listen(f"shm://{path}")) as listener:
            path.chmod(0o777)  # as if the file's permissions had failed
            command = [sys.executable, "-I", "-c", STRANGER, str(uid), str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as stranger:
                assert stranger.stdout is not None
                assert stranger.stdout.readline() == "in\n"
                event = listener.receive(WAIT_S if bytes_read else 0.1)
                assert isinstance(event, Departure) == bool(bytes_read)  # one with no name has no end
                assert int(stranger.stdout.read()) == bytes_read


CLIENT = """
import sys
from tsqp.wire.channel import Frames
from tsqp.wire.transport import connect
channel = connect(sys.argv[1], arena=sys.argv[2])
channel.send(Frames(b"call", (memoryview(bytes(1 << 20)),)), 1 << 20)
channel.receive(60.0)
channel.send(Frames(b"call", (memoryview(bytes(1 << 20)),)), 1 << 20)
channel.receive(60.0)
"""


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_a_killed_client_leaves_nothing(listener: Listener, kind: str, private_dir: Path) -> None:
    still_serves(listener)
    assert isinstance(listener.receive(WAIT_S), Departure)
    before, mapped = descriptors(), mapped_arenas()
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(private_dir)}
    with subprocess.Popen([sys.executable, "-c", CLIENT, listener.address, kind], env=environment) as client:
        listener.send(arrived(listener), Frames(b"done"))
        second = arrived(listener)
        client.kill()
        client.wait()
        assert second.reply is not None
        second.reply[:] = bytes(1 << 20)  # its memory is still there, for us alone
        listener.send(second, Frames(b"done", (second.reply,)))
        assert isinstance(listener.receive(WAIT_S), Departure)
    del second
    assert descriptors() <= before
    assert mapped_arenas() <= mapped  # those of other tests may end meanwhile
    assert not list(private_dir.glob("tsqp/*.arena"))
