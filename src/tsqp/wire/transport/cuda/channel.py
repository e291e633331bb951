"""The trusted side's end of a CUDA IPC connection: a channel of ``shm`` over a mirror of an arena of device memory.

The mirror is memory of the host, this process's alone, laid out as the arena is. A call's tensors are copied from there
before its packet is sent, a product is copied there once its answer is here: what a caller holds, no worker can change.
"""

from __future__ import annotations

import ctypes
import mmap
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress

from tsqp.errors import AddressError, DeviceError, WorkerLost
from tsqp.wire.channel import MAX_FRAME_BYTES, DirectLine
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.base import CONNECT_TIMEOUT_S, Deadline
from tsqp.wire.transport.cuda.driver import IpcDriver
from tsqp.wire.transport.cuda.libcuda import LibCuda
from tsqp.wire.transport.cuda.packets import (
    CUDA_VERSION,
    MOST_ARENA_BYTES,
    Opening,
    aligned,
    encode_opening,
    whole_allocations,
)
from tsqp.wire.transport.shm.channel import ShmChannel, UnderWay
from tsqp.wire.transport.shm.packets import PACKET_BYTES, Region
from tsqp.wire.transport.shm.spin import SPIN_S
from tsqp.wire.transport.shm.unix import dial

ARENA_BYTES = 256 << 20  # of device memory and of locked memory: both are taken at once, not page by page
PARTING_S = 1.0  # how long a worker may take to close the handle, before the memory is freed all the same


def connect_cuda(
    address: Address,
    *,
    driver: IpcDriver | None = None,
    arena_bytes: int = ARENA_BYTES,
    spin_s: float = SPIN_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    user: int | None = None,
) -> CudaChannel:
    """Connect and hand over an arena on the first device that this process sees; a worker takes it once it has loaded.

    ``driver``: that of the device, by ``libcuda`` when not given. ``user`` as in ``connect_shm``.
    Raises WorkerUnreachable, AddressError, PathRefused, DeviceError.
    """
    if not 0 < arena_bytes <= MOST_ARENA_BYTES:
        raise DeviceError(
            f"an arena of {arena_bytes} bytes; choose at most {MOST_ARENA_BYTES} by arena_bytes",
            fields=("arena_bytes",),
        )
    with ExitStack() as resources:
        driver = driver or resources.enter_context(closing(LibCuda(0)))  # first: without CUDA nothing else matters
        line = resources.enter_context(closing(dial(address, connect_timeout_s, user)))
        size = whole_allocations(arena_bytes)
        try:
            device = driver.mem_alloc(size)
        except DeviceError as error:
            raise DeviceError(f"{error}; choose fewer bytes by arena_bytes", fields=("arena_bytes",)) from None
        # Undone in the other order: the worker closes its handle before the memory goes.
        resources.callback(_suppressed(driver.mem_free), device)
        resources.callback(_part, line, PARTING_S)
        mirror = resources.enter_context(closing(Mirror(driver, size)))
        opening = Opening("cuda", CUDA_VERSION, driver.get_handle(device), size, driver.uuid)
        try:
            line.send(encode_opening(opening))
        except OSError:
            raise WorkerLost("went away; start it again and connect anew", address=str(address)) from None
        return CudaChannel(address, max_frame_bytes, line, mirror, spin_s, resources.pop_all(), driver, device)


class Mirror:
    """Memory of the host as large as the arena; see ``Backed``. Locked, where the driver does that, until ``close``.

    It stays mapped while a tensor in it is alive. Raises AddressError where the system does not give it.
    """

    def __init__(self, driver: IpcDriver, size: int) -> None:
        self.size = size
        try:
            self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise AddressError(
                f"cannot make a mirror of {size} bytes: {error.strerror}; choose fewer by arena_bytes",
                fields=("arena_bytes",),
            ) from None
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._driver = driver
        self._locked = driver.lock(self.host, size)

    def back(self, end: int) -> bool:
        """See ``Segment.back``: there is no disk behind it."""
        return True

    def remove_name(self) -> None:
        """See ``Segment.remove_name``: it has none."""

    def close(self) -> None:
        """Unlock it, once no copy is under way. Closing twice is allowed."""
        locked, self._locked = self._locked, False
        with suppress(DeviceError):  # a device that has failed: the process's end unlocks it
            self._driver.synchronise()
            if locked:
                self._driver.unlock(self.host)


class CudaChannel(ShmChannel):
    """See Channel."""

    kind = "device memory"
    remedy = ""

    def __init__(
        self,
        address: Address,
        max_frame_bytes: int,
        line: socket.socket,
        mirror: Mirror,
        spin_s: float,
        resources: ExitStack,
        driver: IpcDriver,
        device: int,
    ) -> None:
        super().__init__(address, max_frame_bytes, line, mirror, spin_s, resources)
        self._driver = driver
        self._device, self._host = device, mirror.host

    def direct(self) -> DirectLine | None:
        """See Channel.direct: a call takes copies, which no compiled step makes."""
        self._check_alive()
        return None

    def _place(self, tensor: memoryview) -> tuple[memoryview, Region]:
        region = self._arena.region_of(tensor)
        if region is not None and aligned(region):
            return tensor, region
        view, region = self._arena.reserve(tensor.nbytes)
        view[:] = tensor.cast("B")
        return view, region

    def _hand_over(self, under_way: UnderWay) -> None:
        """The packet is sent when the copies are done, so the worker's device may read as soon as it has it.

        What a call under way has there already is not copied again: the device may be reading it, and it is as it was.
        """
        there = [region for call in self._under_way.values() for region in self._regions(call.tensors)]
        self._copy(
            [part for region in self._regions(under_way.tensors) for part in outside(region, there)], inwards=True
        )

    def _take_over(self, under_way: UnderWay) -> None:
        """The worker's device has written all of the product before the worker sent the answer."""
        self._copy(self._regions(under_way.product), inwards=False)

    def _regions(self, tensors: tuple[memoryview, ...]) -> list[Region]:
        """Where tensors lie in the arena, and so in its mirror."""
        regions = [self._arena.region_of(tensor) for tensor in tensors]
        return [region for region in regions if region is not None and region.size]

    def _copy(self, regions: Sequence[Region], *, inwards: bool) -> None:
        for region in regions:
            device, host = self._device + region.offset, self._host + region.offset
            if inwards:
                self._driver.copy_in(device, host, region.size)
            else:
                self._driver.copy_out(host, device, region.size)
        if regions:
            self._driver.synchronise()


def outside(region: Region, others: Sequence[Region]) -> Iterator[Region]:
    """The parts of a region that lie in none of the others, in order."""
    at, end = region.offset, region.offset + region.size
    for other in sorted(others, key=lambda one: one.offset):
        if at < other.offset < end:
            yield Region(at, other.offset - at)
        if other.offset < end:
            at = max(at, other.offset + other.size)
    if at < end:
        yield Region(at, end - at)


def _part(line: socket.socket, seconds: float) -> None:
    """End this half of the socket, and wait until the worker has closed the handle, which it does before its half."""
    with suppress(OSError):  # it is gone, and its handle with it
        line.shutdown(socket.SHUT_WR)
        poller, deadline = select.poll(), Deadline(seconds)
        poller.register(line, select.POLLIN)
        while poller.poll(deadline.remaining_ms) and line.recv(PACKET_BYTES) and not deadline.passed:
            pass
    line.close()


def _suppressed(free: Callable[[int], None]) -> Callable[[int], None]:
    def work(address: int) -> None:
        with suppress(DeviceError):  # a device that has failed: the process's end frees it
            free(address)

    return work
