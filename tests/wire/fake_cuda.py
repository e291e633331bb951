"""A driver for CUDA IPC whose device is shared memory, so that two real processes can have the same "device memory".

It does no copy before it must: until ``synchronise`` the target holds bytes that nobody wrote. What CUDA leaves
undefined, or refuses, raises ``IpcViolation``; memory that is freed while the other side has it open is counted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import struct
from collections.abc import Callable
from pathlib import Path

from tsqp.errors import DeviceError
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.transport.cuda.driver import HANDLE_BYTES
from tsqp.wire.transport.cuda.packets import ALLOCATION_BYTES

DEVICE, OTHER_DEVICE = bytes(range(16)), bytes(range(16, 32))
NOT_COPIED_IN, NOT_COPIED_OUT = 0xA5, 0x5A
COUNT_BYTES = mmap.PAGESIZE  # after the memory: how many have it open

_HANDLE = struct.Struct("<II16s")  # process, descriptor, and a name that no other allocation has


class IpcViolation(AssertionError):
    """Something that CUDA refuses or leaves undefined."""


class FakeIpc:
    """See IpcDriver. ``room``: bytes of the device. ``locks``: whether memory of the host can be locked."""

    def __init__(
        self, uuid: bytes = DEVICE, *, opens_own_handles: bool = True, room: int = 1 << 40, locks: bool = True
    ) -> None:
        self.uuid = uuid
        self.opens_own_handles = opens_own_handles
        self.room, self.locks = room, locks
        self.allocated: dict[int, tuple[mmap.mmap, int, bytes]] = {}  # memory, descriptor and name, by address
        self.opened: dict[int, mmap.mmap] = {}
        self.locked: dict[int, int] = {}
        self.freed_while_open = self.synchronised = self.copied = 0
        self._queue: list[Callable[[], None]] = []

    def mem_alloc(self, size: int) -> int:
        if size % ALLOCATION_BYTES:
            raise IpcViolation("an allocation that shares its block with others")
        if size > self.room:
            raise DeviceError("CUDA's driver refused cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
        name = secrets.token_hex(8).encode()
        fd = os.memfd_create(f"fake-cuda-{name.decode()}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size + COUNT_BYTES)
        memory = mmap.mmap(fd, size + COUNT_BYTES)
        address = _address(memory)
        self.allocated[address] = memory, fd, name
        return address

    def mem_free(self, address: int) -> None:
        self._idle()
        memory, fd, _ = self.allocated.pop(address)
        self.freed_while_open += bool(memory[-1])
        memory.close()
        os.close(fd)

    def get_handle(self, address: int) -> bytes:
        _, fd, name = self.allocated[address]
        return _HANDLE.pack(os.getpid(), fd, name).ljust(HANDLE_BYTES, b"\0")

    def open_handle(self, handle: bytes) -> DeviceMemory:
        process, descriptor, name = _HANDLE.unpack_from(handle)
        path = Path(f"/proc/{process}/fd/{descriptor}")
        try:
            if f"fake-cuda-{name.decode(errors='replace')}" not in str(path.readlink()):
                raise FileNotFoundError
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise DeviceError("CUDA's driver refused cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_HANDLE") from None
        try:
            memory = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        memory[-1] += 1
        address = _address(memory)
        self.opened[address] = memory
        return DeviceMemory(address, len(memory) - COUNT_BYTES)

    def close_handle(self, address: int) -> None:
        self._idle()
        memory = self.opened.pop(address)
        memory[-1] -= 1
        memory.close()

    def lock(self, host: int, size: int) -> bool:
        if self.locks:
            self.locked[host] = size
        return self.locks

    def unlock(self, host: int) -> None:
        self._idle()
        del self.locked[host]

    def copy_in(self, device: int, host: int, size: int) -> None:
        self._check(device, size)
        ctypes.memset(device, NOT_COPIED_IN, size)
        self._queue.append(lambda: self._copy(device, host, device, size))

    def copy_out(self, host: int, device: int, size: int) -> None:
        self._check(device, size)
        ctypes.memset(host, NOT_COPIED_OUT, size)
        self._queue.append(lambda: self._copy(host, device, device, size))

    def synchronise(self) -> None:
        self.synchronised += 1
        for work in reversed(self._queue):  # no order is promised
            work()
        self._queue.clear()

    def holds(self, address: int, size: int) -> bool:
        """Whether these are bytes of memory that this process has on the device now."""
        spans = {start: memory for start, (memory, _, _) in self.allocated.items()} | self.opened
        return any(start <= address and address + size <= start + len(m) - COUNT_BYTES for start, m in spans.items())

    def _copy(self, target: int, source: int, device: int, size: int) -> None:
        self._check(device, size)
        ctypes.memmove(target, source, size)
        self.copied += size

    def _check(self, device: int, size: int) -> None:
        if not self.holds(device, size):
            raise IpcViolation("a copy of memory that is not, or no more, on the device")

    def _idle(self) -> None:
        if self._queue:
            raise IpcViolation("memory is let go of while copies are under way in it")


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
