"""CUDA's driver, by its own library: what ``driver.py`` asks for. Written without a GPU at hand: see docs/cuda-ipc.md.

Each call runs in the device's primary context, which torch uses as well, and leaves the thread's context as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

from tsqp.errors import DeviceError
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.transport.cuda.driver import HANDLE_BYTES, UUID_BYTES

LIBRARY = "libcuda.so.1"

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the default stream, on which others may work
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only value that there is
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", c_ubyte * HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("bytes", c_ubyte * UUID_BYTES),)


# Arguments, as cuda.h has them; each returns a CUresult. A device pointer is a number of 64 bits.
ARGUMENTS: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetUuid_v2": [POINTER(_Uuid), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemsetD8Async": [c_uint64, c_ubyte, c_size_t, c_void_p],
    "cuMemGetAddressRange_v2": [POINTER(c_uint64), POINTER(c_size_t), c_uint64],
    "cuIpcGetMemHandle": [POINTER(_Handle), c_uint64],
    "cuIpcOpenMemHandle_v2": [POINTER(c_uint64), _Handle, c_uint],
    "cuIpcCloseMemHandle": [c_uint64],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
}


def load() -> Any:
    """The library, its functions with their arguments. Raises DeviceError where there is none, or one too old."""
    try:
        library = ctypes.CDLL(LIBRARY)
        for function, arguments in ARGUMENTS.items():
            getattr(library, function).argtypes = arguments
    except OSError:
        raise DeviceError(f"no NVIDIA driver is here ({LIBRARY} is not found), and cuda addresses need one") from None
    except AttributeError as error:
        raise DeviceError(f"the NVIDIA driver is too old for cuda addresses: {error}") from None
    return library


class LibCuda:
    """See IpcDriver. ``ordinal`` counts the devices that this process sees. Raises DeviceError."""

    opens_own_handles = False

    def __init__(self, ordinal: int, *, library: Any = None) -> None:
        self._library = load() if library is None else library
        self._context: c_void_p | None = None
        device, context, uuid, self._stream = c_int(), c_void_p(), _Uuid(), c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        self.uuid = bytes(uuid.bytes)
        self._device = device
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        try:
            with self._current():
                self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        except DeviceError:
            self._release()
            raise

    def mem_alloc(self, size: int) -> int:
        address = c_uint64()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), size)
            try:
                # Fresh memory may hold what this process had there before; the worker would read it.
                self._call("cuMemsetD8Async", address, 0, size, self._stream)
                self._call("cuStreamSynchronize", self._stream)
            except DeviceError:
                self._call("cuMemFree_v2", address)
                raise
        return address.value

    def mem_free(self, address: int) -> None:
        with self._current():
            self._call("cuMemFree_v2", address)

    def get_handle(self, address: int) -> bytes:
        handle = _Handle()
        with self._current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def open_handle(self, handle: bytes) -> DeviceMemory:
        address, first, size = c_uint64(), c_uint64(), c_size_t()
        with self._current():
            self._call(
                "cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
            )
            try:
                self._call("cuMemGetAddressRange_v2", ctypes.byref(first), ctypes.byref(size), address)
            except DeviceError:
                self._call("cuIpcCloseMemHandle", address)
                raise
        return DeviceMemory(address.value, first.value + size.value - address.value)

    def close_handle(self, address: int) -> None:
        with self._current():
            self._call("cuIpcCloseMemHandle", address)

    def lock(self, host: int, size: int) -> bool:
        try:
            with self._current():
                self._call("cuMemHostRegister_v2", host, size, _PORTABLE)
        except DeviceError:
            return False  # copies of other memory are slower, and right
        return True

    def unlock(self, host: int) -> None:
        with self._current():
            self._call("cuMemHostUnregister", host)

    def copy_in(self, device: int, host: int, size: int) -> None:
        with self._current():
            self._call("cuMemcpyHtoDAsync_v2", device, host, size, self._stream)

    def copy_out(self, host: int, device: int, size: int) -> None:
        with self._current():
            self._call("cuMemcpyDtoHAsync_v2", host, device, size, self._stream)

    def synchronise(self) -> None:
        with self._current():
            self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Let go of the stream and the context. Closing twice is allowed; nothing else may be called afterwards."""
        if self._context is None:
            return
        try:
            with self._current():
                self._call("cuStreamDestroy_v2", self._stream)
        except DeviceError:
            pass  # a device that has failed
        finally:
            self._release()

    def _release(self) -> None:
        self._context = None
        self._library.cuDevicePrimaryCtxRelease_v2(self._device)

    @contextmanager
    def _current(self) -> Iterator[None]:
        if self._context is None:
            raise DeviceError("CUDA's driver is used after it was closed")
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(c_void_p()))

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._library, function)(*arguments)
        if result:
            name = c_char_p()
            self._library.cuGetErrorName(result, ctypes.byref(name))
            raise DeviceError(f"CUDA's driver refused {function}: {(name.value or b'error %d' % result).decode()}")
