"""CUDA IPC between two processes, and what one end may count on: order, ends, refusals. The device is a fake."""

from __future__ import annotations

import errno
import json
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.fake_cuda import OTHER_DEVICE, FakeIpc
from tests.wire.links import WAIT_S, arrived
from tsqp.errors import AddressError, ArenaFull, ChannelClosed, DeviceError, OptionError, WorkerLost
from tsqp.wire.channel import Arrival, Departure, Frames, Listener
from tsqp.wire.transport import connect, listen, new_cuda_address
from tsqp.wire.transport.cuda.channel import ARENA_BYTES, PARTING_S, outside
from tsqp.wire.transport.cuda.packets import ALLOCATION_BYTES
from tsqp.wire.transport.shm.packets import Region

ROOT = Path(__file__).parents[2]

Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ends in processes of their own; whatever still runs is killed with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(end: str, address: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.wire.cuda_process", end, address]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        with process:
            pass


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a process prints."""
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line


@pytest.fixture
def driver() -> FakeIpc:
    """That of the end in this process."""
    return FakeIpc()


def test_tensors_cross_between_two_processes(start: Start, driver: FakeIpc) -> None:
    address = said(start("worker", new_cuda_address()))["address"]
    with closing(connect(address, driver=driver, arena_bytes=ALLOCATION_BYTES)) as channel:
        for number in range(3):
            payload = bytes([number]) * 70_000
            channel.send(Frames(b"call", (memoryview(payload),)), len(payload))
            (reply,) = channel.receive(WAIT_S).tensors
            assert bytes(reply) == bytes([number ^ 0xFF]) * 70_000
        slot = channel.slot(4, 4)
        for text in (b"here", b"then"):
            slot.tensor[:] = text
            channel.send_from(slot, b"call")
            assert bytes(channel.receive(WAIT_S).tensors[0]) == bytes(byte ^ 0xFF for byte in text)


def test_the_worker_lets_go_before_the_memory_is_freed(
    start: Start, driver: FakeIpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.wire.transport.cuda.channel.PARTING_S", WAIT_S)  # its process may get no processor
    worker = start("worker", new_cuda_address())
    address = said(worker)["address"]
    for number in range(1, 4):
        channel = connect(address, driver=driver)
        channel.send(Frames(b"call"))
        channel.receive(WAIT_S)
        channel.close()
        assert said(worker) == {"left": f"cuda-{number}", "open": 0}
        assert driver.freed_while_open == 0
        assert not driver.allocated
        assert not driver.locked


def test_a_killed_worker_is_noticed_at_once_and_everything_is_freed(start: Start, driver: FakeIpc) -> None:
    worker = start("worker", new_cuda_address())
    with closing(connect(said(worker)["address"], driver=driver)) as channel:
        channel.send(Frames(b"silence", (memoryview(b"under way"),)), 9)
        assert said(worker) == {"busy": True, "open": 1}
        worker.kill()
        with pytest.raises(WorkerLost, match=f"{channel.address}: the worker went away"):
            channel.receive(1e4)  # which the test's own time limit does not let pass
        assert not driver.allocated
        assert not driver.locked
        with pytest.raises(ChannelClosed):
            channel.send(Frames(b"call"))


def test_a_killed_worker_blocks_no_successor(start: Start, driver: FakeIpc) -> None:
    address = new_cuda_address()
    worker = start("worker", address)
    said(worker)
    worker.kill()
    worker.wait()
    said(start("worker", address))
    with closing(connect(address, driver=driver)) as channel:
        channel.send(Frames(b"call"))
        assert channel.receive(WAIT_S).control == b"call"


def test_a_killed_client_is_a_departure_and_its_handle_is_closed(start: Start, driver: FakeIpc) -> None:
    with closing(listen(new_cuda_address(), driver=driver)) as listener:
        client = start("client", listener.address)
        arrival = arrived(listener)
        listener.send(arrival, Frames(b"", (memoryview(bytes(20)),)))
        assert said(client) == {"answer": "00" * 20}
        assert len(driver.opened) == 1
        client.kill()
        assert listener.receive(WAIT_S) == Departure(arrival.peer)
        assert not driver.opened
        listener.send(arrival, Frames(b"", (memoryview(bytes(20)),)))  # nobody is there, and nothing is touched


def test_a_client_whose_worker_does_not_let_go_ends_all_the_same(driver: FakeIpc) -> None:
    worker = FakeIpc()
    with closing(listen(new_cuda_address(), driver=worker)) as listener:
        channel = connect(listener.address, driver=driver)
        channel.send(Frames(b"call"))
        arrived(listener)
        started = time.monotonic()
        channel.close()
        assert PARTING_S * 0.9 < time.monotonic() - started < PARTING_S + WAIT_S
        assert driver.freed_while_open == 1
        assert not driver.allocated
        assert isinstance(listener.receive(WAIT_S), Departure)
        assert not worker.opened


def test_a_worker_that_closes_closes_its_handles(driver: FakeIpc) -> None:
    worker = FakeIpc()
    listener = listen(new_cuda_address(), driver=worker)
    with closing(connect(listener.address, driver=driver)) as channel:
        channel.send(Frames(b"call"))
        arrived(listener)
        listener.close()
        assert not worker.opened
        with pytest.raises(WorkerLost):
            channel.receive(WAIT_S)
        assert driver.freed_while_open == 0
        assert not driver.allocated


def refused(worker: FakeIpc, client: FakeIpc, **options: Any) -> str:
    """What a client is told whose opening the worker does not take; nothing of it is left on either side."""
    with closing(listen(new_cuda_address(), driver=worker)) as listener:
        thread = threading.Thread(target=listener.receive, args=(WAIT_S,))
        thread.start()
        with closing(connect(listener.address, driver=client, **options)) as channel:
            with pytest.raises(WorkerLost) as caught:
                channel.receive(WAIT_S)
            listener.interrupt()
            thread.join()
    assert not worker.opened
    assert not client.allocated
    assert not client.locked
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_memory_of_another_device_is_refused_and_both_are_named() -> None:
    text = refused(FakeIpc(), FakeIpc(OTHER_DEVICE))
    assert "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f" in text
    assert "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f" in text
    assert "CUDA_VISIBLE_DEVICES" in text


def test_one_process_is_refused_where_the_driver_cannot_do_that() -> None:
    assert "own process" in refused(FakeIpc(opens_own_handles=False), FakeIpc())


def test_a_second_client_is_served_beside_the_first(start: Start) -> None:
    address = said(start("worker", new_cuda_address()))["address"]
    first, second = FakeIpc(), FakeIpc()
    with closing(connect(address, driver=first)) as one, closing(connect(address, driver=second)) as other:
        for channel, text in ((one, b"first"), (other, b"other"), (one, b"again")):
            channel.send(Frames(b"call", (memoryview(text),)), 5)
        assert bytes(one.receive(WAIT_S).tensors[0]) == bytes(byte ^ 0xFF for byte in b"first")
        assert bytes(one.receive(WAIT_S).tensors[0]) == bytes(byte ^ 0xFF for byte in b"again")
        assert bytes(other.receive(WAIT_S).tensors[0]) == bytes(byte ^ 0xFF for byte in b"other")


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(listen(new_cuda_address(), driver=FakeIpc())) as listener:
        yield listener


@pytest.fixture(autouse=True)
def _quick_ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both ends are one thread, nobody lets go of memory while the other end closes."""
    if "listener" in request.fixturenames:
        monkeypatch.setattr("tsqp.wire.transport.cuda.channel.PARTING_S", 0.0)


def test_the_worker_sees_a_call_only_when_its_copies_are_done(listener: Listener, driver: FakeIpc) -> None:
    with closing(connect(listener.address, driver=driver)) as channel:
        place = channel.reserve(100)
        place[:] = b"a" * 100
        channel.send(Frames(b"call", (place,)), 50)
        assert bytes(arrived(listener).frames.tensors[0]) == b"a" * 100
        assert driver.synchronised == 1


def test_what_is_in_reserved_memory_is_the_clients_alone_until_it_is_sent(listener: Listener, driver: FakeIpc) -> None:
    with closing(connect(listener.address, driver=driver, arena_bytes=ALLOCATION_BYTES)) as channel:
        channel.reserve(100)[:] = b"s" * 100
        ((memory, _, _),) = driver.allocated.values()
        assert b"ss" not in memory[:]


def test_a_product_cannot_be_changed_once_it_was_received(listener: Listener, driver: FakeIpc) -> None:
    with closing(connect(listener.address, driver=driver)) as channel:
        channel.send(Frames(b"call"), 4)
        arrival = arrived(listener)
        listener.send(arrival, Frames(b"", (memoryview(b"done"),)))
        (product,) = channel.receive(WAIT_S).tensors
        ((memory, _, _),) = driver.allocated.values()
        memory[:ALLOCATION_BYTES] = bytes(ALLOCATION_BYTES)
        assert bytes(product) == b"done"
        channel.close()
        assert bytes(product) == b"done"  # and stays readable


def test_tensors_begin_where_any_element_is_aligned(listener: Listener, driver: FakeIpc) -> None:
    with closing(connect(listener.address, driver=driver)) as channel:
        place = channel.reserve(1000)
        place[:] = bytes(range(250)) * 4
        for first in (0, 1, 63, 64, 128):
            channel.send(Frames(b"", (place[first : first + 100],)))
            arrival = listener.receive(WAIT_S)
            assert isinstance(arrival, Arrival)
            assert arrival.device is not None
            assert arrival.device.tensors[0].address % 64 == 0


def test_what_a_call_under_way_has_there_is_not_copied_again(listener: Listener, driver: FakeIpc) -> None:
    """The worker's device may be reading it: two parts of a group are two calls with one tensor."""
    with closing(connect(listener.address, driver=driver)) as channel:
        place = channel.reserve(1000)
        place[:] = bytes(range(250)) * 4
        channel.send(Frames(b"", (place[128:448],)), 4)
        for first, end, copied in ((128, 448, 0), (192, 256, 0), (0, 192, 128), (0, 640, 192), (64, 1000, 360)):
            before = driver.copied
            channel.send(Frames(b"", (place[first:end],)), 4)
            assert driver.copied == before + copied
        for _ in range(6):
            arrival = arrived(listener)
            listener.send(arrival, Frames(b"", (memoryview(bytes(arrival.frames.tensors[0])[:4]),)))
            channel.receive(WAIT_S)
        before, place[:] = driver.copied, bytes(1000)  # none is under way, so it may have changed
        channel.send(Frames(b"", (place,)), 4)
        assert driver.copied == before + 1000
        assert bytes(arrived(listener).frames.tensors[0]) == bytes(1000)


@given(
    at=st.integers(0, 40), size=st.integers(1, 40), others=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 40)))
)
def test_what_lies_outside_of_regions_is_every_other_byte_once(
    at: int, size: int, others: list[tuple[int, int]]
) -> None:
    taken = {byte for first, count in others for byte in range(first, first + count)}
    found = [(part.offset, part.size) for part in outside(Region(at, size), [Region(*one) for one in others])]
    assert all(count > 0 for _, count in found)
    assert [byte for first, count in found for byte in range(first, first + count)] == [
        byte for byte in range(at, at + size) if byte not in taken
    ]


def test_the_arena_is_whole_allocations_and_bounds_what_is_sent(listener: Listener, driver: FakeIpc) -> None:
    with closing(connect(listener.address, driver=driver, arena_bytes=1)) as channel:
        ((memory, _, _),) = driver.allocated.values()
        assert len(memory) - 4096 == ALLOCATION_BYTES
        with pytest.raises(ArenaFull, match="arena_bytes"):
            channel.reserve(ALLOCATION_BYTES + 1)
    with closing(connect(listener.address, driver=driver)):
        ((memory, _, _),) = driver.allocated.values()
        assert len(memory) - 4096 == ARENA_BYTES


def test_a_device_without_room_says_which_option_helps(listener: Listener) -> None:
    small = FakeIpc(room=ALLOCATION_BYTES)
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY; choose fewer bytes by arena_bytes") as caught:
        connect(listener.address, driver=small)
    assert caught.value.fields == ("arena_bytes",)
    connect(listener.address, driver=small, arena_bytes=ALLOCATION_BYTES).close()
    for size in (0, 1 << 41):
        with pytest.raises(DeviceError, match="arena_bytes"):
            connect(listener.address, driver=small, arena_bytes=size)
    assert not small.allocated


def test_a_host_without_room_for_the_mirror_says_which_option_helps(
    listener: Listener, driver: FakeIpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    full = SimpleNamespace(mmap=refuse, MAP_PRIVATE=mmap.MAP_PRIVATE, MAP_ANONYMOUS=mmap.MAP_ANONYMOUS)
    monkeypatch.setattr("tsqp.wire.transport.cuda.channel.mmap", full)
    with pytest.raises(AddressError, match="Cannot allocate memory; choose fewer by arena_bytes"):
        connect(listener.address, driver=driver)
    assert not driver.allocated


def test_memory_that_cannot_be_locked_is_copied_all_the_same(listener: Listener) -> None:
    with closing(connect(listener.address, driver=FakeIpc(locks=False))) as channel:
        channel.send(Frames(b"", (memoryview(b"x"),)))
        assert bytes(arrived(listener).frames.tensors[0]) == b"x"


def test_no_compiled_step_goes_round_the_copies(listener: Listener, driver: FakeIpc) -> None:
    with closing(connect(listener.address, driver=driver)) as channel:
        assert channel.direct() is None
        channel.send(Frames(b"call"))
        assert listener.direct(arrived(listener).peer) is None


def test_options_of_cuda_are_refused_elsewhere_and_those_of_others_here() -> None:
    with pytest.raises(OptionError, match="driver can only be chosen for cuda"):
        connect("shm:///x", driver=FakeIpc())
    with pytest.raises(OptionError, match="device can only be chosen for cuda"):
        listen("ipc:///x", device=0)
    with pytest.raises(OptionError, match="arena can only be chosen for shm"):
        connect("cuda:///x", arena="file")


def test_without_cuda_both_ends_say_what_is_missing(private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.wire.transport.cuda.libcuda.LIBRARY", "libcuda-of-no-machine.so.1")
    address = f"cuda://{private_dir}/x.sock"
    for end in (connect, listen):
        with pytest.raises(DeviceError, match=r"no NVIDIA driver is here \(libcuda-of-no-machine.so.1 is not found\)"):
            end(address)
    assert not list(private_dir.iterdir())
