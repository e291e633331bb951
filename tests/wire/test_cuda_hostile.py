"""CUDA IPC against a side that breaks the rules: an error on the other side, never a crash, a hang or a leak."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.wire.fake_cuda import DEVICE, FakeIpc
from tests.wire.links import WAIT_S, arrived
from tests.wire.shm_peers import descriptors_of, raw_client, read_to_end
from tsqp.errors import ChannelClosed, ProtocolError, WorkerLost
from tsqp.wire.channel import Arrival, Departure, Frames, Listener
from tsqp.wire.transport import connect, listen, new_cuda_address
from tsqp.wire.transport.cuda.channel import CudaChannel
from tsqp.wire.transport.cuda.driver import HANDLE_BYTES
from tsqp.wire.transport.cuda.packets import (
    ALLOCATION_BYTES,
    CUDA_VERSION,
    MOST_ARENA_BYTES,
    Opening,
    decode_opening,
    encode_opening,
)
from tsqp.wire.transport.shm.packets import NO_BYTES, OPENING, Answer, Region, Request, encode_answer, encode_request

pack = msgspec.msgpack.encode
slow_fixtures = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def worker() -> FakeIpc:
    return FakeIpc()


@pytest.fixture
def client() -> Iterator[FakeIpc]:
    """A driver with one allocation, for a client without rules."""
    driver = FakeIpc()
    address = driver.mem_alloc(ALLOCATION_BYTES)
    yield driver
    driver.mem_free(address)


@pytest.fixture
def listener(worker: FakeIpc) -> Iterator[Listener]:
    with closing(listen(new_cuda_address(), driver=worker, max_frame_bytes=1 << 20)) as listener:
        yield listener
    assert not worker.opened


def opening(client: FakeIpc, **changed: Any) -> bytes:
    handle = client.get_handle(next(iter(client.allocated)))
    return encode_opening(
        msgspec.structs.replace(Opening("cuda", CUDA_VERSION, handle, ALLOCATION_BYTES, DEVICE), **changed)
    )


@contextmanager
def connected(listener: Listener) -> Iterator[socket.socket]:
    with raw_client(listener.address.replace("cuda:", "shm:")) as line:
        yield line


def ended(listener: Listener) -> None:
    """The connection ends, and nothing else comes of it."""
    assert isinstance(listener.receive(WAIT_S), Departure)


# A client without rules


@pytest.mark.parametrize(
    "changed",
    [
        {"version": CUDA_VERSION + 1},
        {"size": 0},
        {"size": -1},
        {"size": ALLOCATION_BYTES + 1},
        {"size": 2 * ALLOCATION_BYTES},  # than which the allocation is smaller
        {"size": 1 << 41},
        {"size": 1 << 70},
        {"uuid": bytes(16)},
        {"uuid": DEVICE[:15]},
        {"handle": bytes(HANDLE_BYTES)},
        {"handle": bytes(HANDLE_BYTES - 1)},
        {"handle": b"\xff" * HANDLE_BYTES},
        {"kind": "shm"},
    ],
    ids=str,
)
def test_an_opening_that_is_not_right_is_refused_with_a_reason(
    changed: dict[str, Any], listener: Listener, client: FakeIpc, worker: FakeIpc
) -> None:
    whole = Opening("cuda", CUDA_VERSION, client.get_handle(next(iter(client.allocated))), ALLOCATION_BYTES, DEVICE)
    fields = {**{name: getattr(whole, name) for name in whole.__struct_fields__}, **changed}
    packet = b"" if fields["size"] >= 1 << 64 else pack(list(fields.values()))
    with connected(listener) as line:
        line.send(packet or b"\xc1")
        ended(listener)
        (answer,) = read_to_end(line)
        assert answer[:8] == encode_answer(Answer(OPENING, b""))
        assert 0 < len(answer[8:]) < 1000
    assert not worker.opened


def test_an_opening_of_shm_is_refused(listener: Listener) -> None:
    with closing(connect(listener.address.replace("cuda:", "shm:"))) as channel:
        ended(listener)
        with pytest.raises(WorkerLost, match="refused the shared memory"):
            channel.receive(WAIT_S)


FIELDS: dict[str, Any] = {
    "kind": "cuda",
    "version": CUDA_VERSION,
    "handle": bytes(HANDLE_BYTES),
    "size": ALLOCATION_BYTES,
    "uuid": DEVICE,
}
ANYTHING = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9) | st.binary(max_size=9)
OTHER = {
    "kind": st.sampled_from(["shm", "CUDA", b"cuda"]),
    "version": st.integers(0, 2**63),
    "handle": st.binary(min_size=HANDLE_BYTES - 1, max_size=HANDLE_BYTES + 1),
    "size": st.integers(-(2**63), 2**63 - 1) | st.integers(0, 1 << 20).map(lambda n: n * ALLOCATION_BYTES),
    "uuid": st.binary(min_size=len(DEVICE) - 1, max_size=len(DEVICE) + 1),
}


def right(name: str, value: Any) -> bool:
    if type(value) is not type(FIELDS[name]):
        return False
    if name == "size":
        return value % ALLOCATION_BYTES == 0 and ALLOCATION_BYTES <= value <= MOST_ARENA_BYTES
    return value == FIELDS[name] if name in ("kind", "version") else len(value) == len(FIELDS[name])


@pytest.mark.parametrize("name", FIELDS)
@given(data=st.data())
def test_an_opening_is_read_as_it_was_written_or_refused(name: str, data: st.DataObject) -> None:
    """Right but for one field, which has any value."""
    fields = {**FIELDS, name: data.draw(OTHER[name] | ANYTHING)}
    packet = pack(list(fields.values()))
    if right(name, fields[name]):
        assert decode_opening(packet) == Opening(**fields)
    else:
        with pytest.raises(ProtocolError):
            decode_opening(packet)


@given(packet=st.binary(min_size=1, max_size=200))
def test_other_bytes_are_no_opening(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_opening(packet)


@example(size=ALLOCATION_BYTES + 64)
@given(size=st.integers(ALLOCATION_BYTES, MOST_ARENA_BYTES))
def test_a_part_of_an_allocation_is_no_arena(size: int) -> None:
    size += size % ALLOCATION_BYTES == 0
    with pytest.raises(ProtocolError, match="no multiple"):
        decode_opening(pack(["cuda", CUDA_VERSION, bytes(HANDLE_BYTES), min(size, MOST_ARENA_BYTES - 1), DEVICE]))


WRONG = {
    "beyond the arena": (Region(ALLOCATION_BYTES - 64, 128), NO_BYTES),
    "far beyond it": (Region(2**64 - 64, 64), NO_BYTES),
    "at no place for a tensor": (Region(32, 8), NO_BYTES),
    "over the limit": (Region(0, (1 << 20) + 64), NO_BYTES),
    "a product beyond the arena": (Region(0, 8), Region(ALLOCATION_BYTES, 64)),
    "a product at no place": (Region(0, 8), Region(100, 8)),
    "a product over its input": (Region(0, 128), Region(64, 64)),
}


@pytest.mark.parametrize("places", WRONG.values(), ids=WRONG.keys())
def test_places_that_are_not_right_end_the_connection(
    places: tuple[Region, Region], listener: Listener, client: FakeIpc, worker: FakeIpc
) -> None:
    tensor, product = places
    with connected(listener) as line:
        line.send(opening(client))
        line.send(encode_request(Request(1, b"good", (Region(64, 8),), Region(0, 64))))
        assert arrived(listener).frames.control == b"good"
        line.send(encode_request(Request(2, b"bad", (tensor,), product)))
        ended(listener)
        assert not worker.opened


numbers = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 2 * ALLOCATION_BYTES), st.integers(0, 40).map(lambda n: n * 64)
)
regions = st.builds(Region, numbers, numbers)


@slow_fixtures
@given(
    packets=st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.builds(
                lambda tensors, product: encode_request(Request(1, b"c", tuple(tensors), product)),
                st.lists(regions, max_size=2),
                regions,
            ),
        ),
        max_size=5,
    )
)
def test_whatever_arrives_lies_in_the_clients_own_arena(packets: list[bytes]) -> None:
    worker, client = FakeIpc(), FakeIpc()
    client.mem_alloc(ALLOCATION_BYTES)
    with closing(listen(new_cuda_address(), driver=worker)) as listener, connected(listener) as line:
        with suppress(BrokenPipeError):
            for packet in [opening(client), *packets]:
                line.send(packet)
            line.shutdown(socket.SHUT_WR)
        while isinstance(event := listener.receive(WAIT_S), Arrival):
            assert event.device is not None
            for memory in (*event.device.tensors, event.device.reply):
                assert worker.holds(memory.address, memory.nbytes)
                assert memory.address % 64 == 0
        assert isinstance(event, Departure)
        assert not worker.opened
    client.mem_free(next(iter(client.allocated)))


def test_descriptors_from_a_client_are_not_taken(listener: Listener, client: FakeIpc) -> None:
    with connected(listener) as line, tempfile.TemporaryFile() as file:
        socket.send_fds(line, [opening(client)], [file.fileno()] * 50)
        line.send(encode_request(Request(1, b"call")))
        arrived(listener)
        assert descriptors_of(file.fileno()) == 1


def test_a_client_that_leaves_before_its_opening_leaves_nothing(listener: Listener, worker: FakeIpc) -> None:
    with connected(listener):
        pass
    ended(listener)
    assert not worker.opened


# A worker without rules


@contextmanager
def raw_worker(directory: Path, client: FakeIpc) -> Iterator[tuple[socket.socket, CudaChannel]]:
    """A socket that does what the test says, and the channel of a trusted side that is connected to it."""
    path = directory / "raw.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        server.listen()
        channel = connect(f"cuda://{path}", driver=client, arena_bytes=ALLOCATION_BYTES)
        assert isinstance(channel, CudaChannel)
        line, _ = server.accept()
        with closing(line), closing(channel):
            line.settimeout(WAIT_S)
            line.recv(8192)
            yield line, channel


def receive_all(channel: CudaChannel) -> None:
    """Receive for ever, replies of 8 bytes each."""
    while True:
        assert [tensor.nbytes for tensor in channel.receive(WAIT_S).tensors] == [8]


@pytest.fixture(autouse=True)
def _quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody lets go of memory here while the other end closes."""
    monkeypatch.setattr("tsqp.wire.transport.cuda.channel.PARTING_S", 0.0)


@pytest.mark.parametrize("packet", [b"\xc1", bytes(7), encode_answer(Answer(5, b"")), bytes(100_000)], ids=len)
def test_a_packet_that_is_no_answer_ends_the_channel_and_frees_all(packet: bytes, private_dir: Path) -> None:
    client = FakeIpc()
    with raw_worker(private_dir, client) as (line, channel):
        channel.send(Frames(b"call", (memoryview(b"x"),)), 1000)
        line.send(packet)
        with pytest.raises(ProtocolError):
            channel.receive(WAIT_S)
        with pytest.raises(ChannelClosed, match="ProtocolError"):
            channel.receive(WAIT_S)
        assert not client.allocated
        assert not client.locked


def test_a_worker_that_scribbles_over_everything_changes_products_and_nothing_else(private_dir: Path) -> None:
    client = FakeIpc()
    with raw_worker(private_dir, client) as (line, channel):
        line.send(encode_answer(Answer(OPENING, b"")))
        ((memory, _, _),) = client.allocated.values()
        for number, fill in enumerate((0xFF, 0x00, 0x80), start=1):
            place = channel.reserve(1000)
            place[:] = b"p" * 1000
            channel.send(Frames(b"call", (place,)), 5000)
            memory[:ALLOCATION_BYTES] = bytes([fill]) * ALLOCATION_BYTES
            line.send(encode_answer(Answer(number, b"done")))
            (product,) = channel.receive(WAIT_S).tensors
            memory[:ALLOCATION_BYTES] = os.urandom(ALLOCATION_BYTES)
            assert bytes(product) == bytes([fill]) * 5000
            assert bytes(place) == b"p" * 1000


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packets=st.lists(st.binary(max_size=200) | st.integers(0, 3).map(lambda n: encode_answer(Answer(n, b"")))))
def test_any_packets_are_answers_or_an_error(packets: list[bytes], private_dir: Path) -> None:
    client = FakeIpc()
    with (
        tempfile.TemporaryDirectory(dir=private_dir) as directory,
        raw_worker(Path(directory), client) as (line, channel),
    ):
        channel.send(Frames(b"call"), 8)
        with suppress(BrokenPipeError):
            for packet in packets:
                line.send(packet)
        line.shutdown(socket.SHUT_WR)
        with pytest.raises((ProtocolError, WorkerLost)):
            receive_all(channel)
    assert not client.allocated
