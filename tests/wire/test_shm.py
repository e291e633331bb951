"""Shared memory: where tensors lie, when their memory comes back, and that nothing is left of a connection."""

from __future__ import annotations

import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.wire.links import WAIT_S, arrived, tensor
from tests.wire.shm_peers import taken_bytes
from tsqp.errors import (
    AddressError,
    ArenaFull,
    ChannelClosed,
    DeadlineExceeded,
    OptionError,
    ProtocolError,
    WorkerUnreachable,
)
from tsqp.wire.channel import Arrival, Departure, Frames, Listener
from tsqp.wire.transport import connect, listen, new_shm_address
from tsqp.wire.transport.runtime_dir import reclaim_stale, runtime_directory
from tsqp.wire.transport.shm.channel import MAX_UNDER_WAY, ShmChannel

MIB = 1 << 20
ARENA_BYTES = 16 * MIB


@pytest.fixture
def listener(private_dir: Path) -> Iterator[Listener]:
    with closing(listen(f"shm://{private_dir}/worker.sock")) as listener:
        yield listener


@pytest.fixture(params=["memfd", "file"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def channel(listener: Listener, kind: Any) -> Iterator[ShmChannel]:
    with closing(open_channel(listener, arena=kind)) as channel:
        yield channel


def open_channel(listener: Listener, **options: Any) -> ShmChannel:
    channel = connect(listener.address, arena_bytes=ARENA_BYTES, **options)
    assert isinstance(channel, ShmChannel)
    return channel


def mappings() -> set[tuple[str, str]]:
    """Address range and inode of each arena that is mapped: those of other tests may be there, and may go."""
    gc.collect()  # other tests may have left channels in circles of references
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return {(one[0], one[4]) for one in lines if "tsqp-arena" in one[-1] or ".arena" in one[-1]}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def doubled(channel: ShmChannel, listener: Listener, value: int) -> torch.Tensor:
    """One call, written in place on both sides: 1,000 numbers there, twice as much back."""
    place = channel.reserve(4000)
    torch.frombuffer(place, dtype=torch.int32).fill_(value)
    channel.send(Frames(b"double", (place,)), 4000)
    del place
    arrival = arrived(listener)
    assert arrival.reply is not None
    x = torch.frombuffer(arrival.frames.tensors[0], dtype=torch.int32)
    torch.mul(x, 2, out=torch.frombuffer(arrival.reply, dtype=torch.int32))
    listener.send(arrival, Frames(b"done", (arrival.reply,)))
    (reply,) = channel.receive(WAIT_S).tensors
    return torch.frombuffer(reply, dtype=torch.int32)


# Where tensors lie


def test_both_sides_compute_in_place(channel: ShmChannel, listener: Listener) -> None:
    product = doubled(channel, listener, 21)
    assert product.tolist() == [42] * 1000


def test_what_lies_in_the_arena_is_not_copied(channel: ShmChannel, listener: Listener) -> None:
    place = channel.reserve(MIB)
    before = taken_bytes(channel)
    channel.send(Frames(b"", (place[100:200], place)))
    assert taken_bytes(channel) == before
    inside, _ = arrived(listener).frames.tensors
    place[100:200] = b"x" * 100
    assert bytes(inside) == b"x" * 100  # the very same memory


def test_what_lies_elsewhere_is_copied_once(channel: ShmChannel, listener: Listener) -> None:
    before = taken_bytes(channel)
    elsewhere = bytearray(b"private")
    with closing(open_channel(listener)) as other:
        foreign = other.reserve(64)
        foreign[:] = b"f" * 64
        channel.send(Frames(b"", (tensor(elsewhere), foreign)))
    assert taken_bytes(channel) == before + 128
    elsewhere[:] = b"changed"
    assert [bytes(part) for part in arrived(listener).frames.tensors] == [b"private", b"f" * 64]


def test_a_product_computed_elsewhere_is_copied_to_its_place(channel: ShmChannel, listener: Listener) -> None:
    channel.send(Frames(b""), 24)
    floats: Any = memoryview(bytearray(range(24))).cast("f", (2, 3))
    listener.send(arrived(listener), Frames(b"", (floats,)))
    assert bytes(channel.receive(WAIT_S).tensors[0]) == bytes(range(24))


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_product_of_another_size_is_refused_at_the_worker(channel: ShmChannel, listener: Listener, size: int) -> None:
    channel.send(Frames(b""), 24)
    arrival = arrived(listener)
    with pytest.raises(ProtocolError, match="24"):
        listener.send(arrival, Frames(b"", (tensor(bytes(size)),)))
    listener.send(arrival, Frames(b"failed"))
    assert channel.receive(WAIT_S).control == b"failed"


# When their memory comes back


@pytest.mark.parametrize(
    "derive",
    [
        lambda view: view,
        lambda view: view[64:128],
        lambda view: view.cast("f"),
        lambda view: torch.frombuffer(view, dtype=torch.bfloat16)[7:9],
        lambda view: torch.frombuffer(view, dtype=torch.float32).view(2, -1).numpy().data,
    ],
    ids=["the view", "a slice", "a cast", "a tensor", "an array over a tensor"],
)
def test_memory_is_free_when_nothing_refers_to_it(channel: ShmChannel, derive: Callable[[memoryview], object]) -> None:
    before = taken_bytes(channel)
    derived = derive(channel.reserve(MIB))
    assert taken_bytes(channel) == before + MIB
    del derived
    assert taken_bytes(channel) == before


def test_a_call_under_way_keeps_its_memory_until_its_reply(channel: ShmChannel, listener: Listener) -> None:
    before = taken_bytes(channel)
    channel.send(Frames(b"", (channel.reserve(MIB), tensor(bytes(MIB)))), MIB)
    assert taken_bytes(channel) == before + 3 * MIB
    listener.send(arrived(listener), Frames(b""))
    reply = channel.receive(WAIT_S)
    assert taken_bytes(channel) == before + MIB
    del reply
    assert taken_bytes(channel) == before


def test_a_full_arena_says_how_large_it_is_and_what_to_do(channel: ShmChannel) -> None:
    kept = channel.reserve(ARENA_BYTES // 2)
    with pytest.raises(ArenaFull, match=f"{ARENA_BYTES} bytes, of which .* fewer rows"):
        channel.reserve(ARENA_BYTES // 2 + 1)
    kept[0] = 1
    with pytest.raises(ChannelClosed, match="ArenaFull"):
        channel.reserve(1)


def test_a_reply_that_does_not_fit_is_not_asked_for(channel: ShmChannel) -> None:
    with pytest.raises(ArenaFull):
        channel.send(Frames(b""), ARENA_BYTES + 1)


def test_tensors_outlive_their_channel(listener: Listener, kind: Any) -> None:
    before = mappings()
    channel = open_channel(listener, arena=kind)
    place = channel.reserve(MIB)
    channel.close()
    place[:] = bytes(MIB)
    assert mappings() - before
    del place
    listener.receive(0.0)
    del channel
    assert not mappings() - before


# Many calls, many connections


def test_ten_thousand_calls_leave_nothing(channel: ShmChannel, listener: Listener) -> None:
    doubled(channel, listener, 0)
    taken, mapped, before = taken_bytes(channel), mappings(), descriptors()
    for number in range(10_000):
        assert doubled(channel, listener, number)[-1] == 2 * number
    assert taken_bytes(channel) == taken
    assert mappings() <= mapped
    assert descriptors() < before + 100  # one of each call would be a hundred times as many


def test_two_hundred_connections_leave_nothing(listener: Listener, kind: Any) -> None:
    def connect_once() -> None:
        with closing(open_channel(listener, arena=kind)) as channel:
            assert doubled(channel, listener, 1)[0] == 2
        assert isinstance(listener.receive(WAIT_S), Departure)

    mapped = mappings()
    connect_once()
    before = descriptors()
    for _ in range(200):
        connect_once()
    assert mappings() <= mapped
    assert descriptors() < before + 100  # one of each connection would be twice as many; others' come and go


def test_more_calls_than_fit_under_way(channel: ShmChannel, listener: Listener) -> None:
    def echo() -> None:
        while (event := listener.receive(None)) is not None:
            if isinstance(event, Arrival):
                listener.send(event, event.frames)

    thread = threading.Thread(target=echo)
    thread.start()
    try:
        for number in range(3 * MAX_UNDER_WAY):
            channel.send(Frames(b"%d" % number, (tensor(b"%4d" % number),)), 4)
        for number in range(3 * MAX_UNDER_WAY):
            frames = channel.receive(WAIT_S)
            assert (frames.control, bytes(frames.tensors[0])) == (b"%d" % number, b"%4d" % number)
    finally:
        listener.interrupt()
        thread.join()


def test_a_busy_connection_does_not_keep_the_others_waiting(listener: Listener) -> None:
    with closing(open_channel(listener)) as busy, closing(open_channel(listener)) as quiet:
        quiet.send(Frames(b"quiet"))
        for _ in range(100):
            busy.send(Frames(b"busy"))
        heard = []
        while b"quiet" not in heard:
            arrival = arrived(listener)
            heard.append(arrival.frames.control)
            listener.send(arrival, arrival.frames)
        assert len(heard) < 40


def test_a_busy_worker_hears_that_it_shall_stop(channel: ShmChannel, listener: Listener) -> None:
    for _ in range(200):
        channel.send(Frames(b""))
    listener.send(arrived(listener), Frames(b""))
    listener.interrupt()
    while (event := listener.receive(None)) is not None:
        assert isinstance(event, Arrival)
        listener.send(event, event.frames)
    assert listener.interrupted


def test_idle_sides_cost_less_than_a_hundredth_of_a_core(channel: ShmChannel, listener: Listener) -> None:
    doubled(channel, listener, 1)  # both have just been busy
    gc.disable()  # a collection is this thread's time too, and takes longer the more other tests have loaded
    try:
        for wait in (lambda: listener.receive(1.0), lambda: channel.receive(1.0)):
            before = time.thread_time()  # of this thread alone
            with suppress(DeadlineExceeded):
                assert wait() is None
            assert time.thread_time() - before < 0.01
    finally:
        gc.enable()


# Files


def test_a_file_has_a_private_name_until_the_worker_has_it(
    listener: Listener, private_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(private_dir))  # workers that other tests have killed left theirs
    with closing(open_channel(listener, arena="file")) as channel:
        (path,) = runtime_directory().glob("*.arena")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert reclaim_stale(runtime_directory()) == []
        doubled(channel, listener, 1)
        assert not path.exists()


def test_a_file_whose_maker_was_killed_is_swept(private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(private_dir))
    code = (
        "import os, signal; from tsqp.wire.transport.shm.segment import Segment; s = Segment('file', 1 << 20); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (path,) = runtime_directory().glob("*.arena")
    assert reclaim_stale(runtime_directory()) == [path]
    assert not path.exists()


def test_a_disk_without_room_is_an_error_and_no_crash(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with closing(open_channel(listener, arena="file")) as channel:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ArenaFull, match="XDG_RUNTIME_DIR"):
            channel.reserve(MIB)


# Options and addresses


@pytest.mark.parametrize("size", [0, 100, 1 << 60])
def test_an_impossible_arena_is_refused(listener: Listener, size: int) -> None:
    with pytest.raises(AddressError, match="arena"):
        connect(listener.address, arena_bytes=size)


def test_options_of_shared_memory_are_refused_elsewhere() -> None:
    with pytest.raises(OptionError, match="arena_bytes"):
        connect("mem:x", arena_bytes=MIB)
    with pytest.raises(OptionError, match="spin_s"):
        listen("tcp://127.0.0.1:0", spin_s=0.0)


def test_a_worker_of_another_transport_is_named_as_such(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    with closing(listen(f"ipc://{path}")), pytest.raises(WorkerUnreachable, match="ipc"):
        connect(f"shm://{path}")


def test_a_worker_that_takes_nobody_in_is_unreachable_in_time(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        server.listen(0)
        with closing(connect(f"shm://{path}")), pytest.raises(WorkerUnreachable, match="in time"):
            connect(f"shm://{path}", connect_timeout_s=0.05)


def test_new_addresses_differ_and_can_be_used() -> None:
    first, second = new_shm_address(), new_shm_address()
    assert first != second
    with (
        closing(listen(first)) as one,
        closing(listen(second)) as other,
        closing(open_channel(one)) as channel,
        closing(open_channel(other)),
    ):
        assert (channel.address, channel.transport) == (first, "shm")
