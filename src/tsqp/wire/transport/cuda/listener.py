"""The worker's end of all its CUDA IPC connections: those of ``shm``, but for the memory that requests name."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Collection
from contextlib import ExitStack, closing, suppress

from tsqp.errors import DeviceError, ProtocolError
from tsqp.wire.channel import MAX_FRAME_BYTES, Arrival, DeviceTensors, DirectCalls, Frames
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.cuda.driver import IpcDriver, uuid_text
from tsqp.wire.transport.cuda.libcuda import LibCuda
from tsqp.wire.transport.cuda.packets import aligned, decode_opening
from tsqp.wire.transport.shm.connection import Connection
from tsqp.wire.transport.shm.listener import ShmListener, check_fits
from tsqp.wire.transport.shm.packets import OPENING, PACKET_BYTES, Region, split_request
from tsqp.wire.transport.shm.spin import SPIN_S
from tsqp.wire.transport.shm.unix import listen_at, process_of


def listen_cuda(
    address: Address,
    *,
    driver: IpcDriver | None = None,
    device: int = 0,
    spin_s: float = SPIN_S,
    watch_fd: int | None = None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    users: Collection[int] = (),
) -> CudaListener:
    """Listen, for clients whose memory is on this device. ``driver``: that of the device, ``device`` its number.

    Raises AddressInUse, AddressError, PathRefused, DeviceError.
    """
    with ExitStack() as resources:
        driver = driver or resources.enter_context(closing(LibCuda(device)))
        line, claim = listen_at(address, users)
        resources.callback(claim.release)
        resources.enter_context(line)
        allowed = frozenset((os.geteuid(), *users))
        return CudaListener(address, max_frame_bytes, line, spin_s, watch_fd, allowed, resources.pop_all(), driver)


class CudaListener(ShmListener):
    """See Listener. Tensors of a message are in ``Arrival.device``; nobody but the device reads them."""

    def __init__(
        self,
        address: Address,
        max_frame_bytes: int,
        line: socket.socket,
        spin_s: float,
        watch_fd: int | None,
        users: frozenset[int],
        resources: ExitStack,
        driver: IpcDriver,
    ) -> None:
        super().__init__(address, max_frame_bytes, line, spin_s, watch_fd, users, resources)
        self._driver = driver

    def direct(self, peer: bytes) -> DirectCalls | None:
        """See Listener.direct."""
        self._check_open()
        return None

    def _new_connection(self, number: bytes, line: socket.socket) -> CudaConnection:
        return CudaConnection(b"cuda-" + number, line, self._max_frame_bytes, self._driver)

    def _put_product(self, arrival: Arrival, frames: Frames) -> None:
        """Copy a product of the host to its place. Raises ProtocolError where it has none, DeviceError."""
        if arrival.device is None or len(frames.tensors) != 1:
            raise ProtocolError("an answer over cuda has at most one tensor, for the place that its call names")
        place, (product,) = arrival.device.reply, frames.tensors
        check_fits(product, place.nbytes)
        copy = bytearray(product.cast("B"))
        if copy:
            self._driver.copy_in(place.address, ctypes.addressof(ctypes.c_char.from_buffer(copy)), len(copy))
            self._driver.synchronise()


class CudaConnection(Connection[DeviceMemory]):
    """One client. Its handle is closed before its socket: the client frees the memory when it sees the socket end."""

    def __init__(self, peer: bytes, line: socket.socket, max_frame_bytes: int, driver: IpcDriver) -> None:
        super().__init__(peer, line, max_frame_bytes)
        self._driver = driver
        self._mapped: int | None = None  # the address of an open handle

    def received(self, packet: bytes) -> Arrival:
        if not packet:
            raise EOFError
        sequence, places, control = split_request(packet)
        found = DeviceTensors(*(self._known.get(places) or self._lay_out(places)))
        return Arrival(self.peer, Frames(control), None, sequence, places, found)

    def close(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with suppress(DeviceError):  # a device that has failed: the process's end closes it
                self._driver.close_handle(mapped)
        super().close()

    def _open(self) -> DeviceMemory:
        packet = self.line.recv(PACKET_BYTES)
        if not packet:
            raise EOFError
        try:
            arena = self._map(packet)
        except (ProtocolError, DeviceError) as error:
            self.answer(OPENING, str(error).encode(errors="replace"))
            raise ProtocolError("an arena that was refused") from None
        self.answer(OPENING, b"")
        return arena

    def _map(self, packet: bytes) -> DeviceMemory:
        """The arena of an opening. Raises ProtocolError, DeviceError."""
        opening = decode_opening(packet)
        if opening.uuid != self._driver.uuid:
            raise ProtocolError(
                f"memory of {uuid_text(opening.uuid)}, and this worker computes on {uuid_text(self._driver.uuid)}: "
                "choose a device by CUDA_VISIBLE_DEVICES"
            )
        if process_of(self.line) == os.getpid() and not self._driver.opens_own_handles:
            raise ProtocolError("memory of the worker's own process, whose handle CUDA does not open: use shm or mem")
        whole = self._driver.open_handle(opening.handle)
        self._mapped = whole.address
        if whole.nbytes < opening.size:
            raise ProtocolError(f"an arena of {opening.size} bytes in an allocation of {whole.nbytes}")
        return DeviceMemory(whole.address, opening.size)

    def _cut(self, region: Region) -> DeviceMemory:
        arena = self._arena or DeviceMemory(0, 0)
        self._check_inside(region, arena.nbytes)
        if not aligned(region):
            raise ProtocolError(f"a tensor at byte {region.offset} of an arena, where none begins")
        return DeviceMemory(arena.address + region.offset, region.size)
