"""CUDA's driver by ctypes, over a library that is Python: which calls are made, with what, and what a refusal leaves.

Whether the real library does what these calls expect takes a device: ``tests/gpu/test_cuda_ipc.py``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from tests.wire.fake_cuda import DEVICE
from tsqp.errors import DeviceError
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.transport.cuda import libcuda
from tsqp.wire.transport.cuda.driver import HANDLE_BYTES
from tsqp.wire.transport.cuda.libcuda import ARGUMENTS, LibCuda

MADE = 0x7000_0000
MAPPED = 0x9000_0000
HANDLE = bytes(range(HANDLE_BYTES))
OUTSIDE = {"cuInit", "cuGetErrorName", "cuDeviceGet", "cuDeviceGetUuid_v2"} | {
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
}  # calls that need no context


class Library:
    """Functions of libcuda. ``refused``: names that fail. What a context is needed for fails without one."""

    def __init__(self, *refused: str) -> None:
        self.refused = set(refused)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.depth = self.retained = self.streams = 0
        self.memory: set[int] = set()
        self.opened: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in ARGUMENTS:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            assert len(arguments) == len(ARGUMENTS[name])
            plain = tuple(getattr(one, "value", one) for one in arguments)
            self.calls.append((name, plain))
            if name in self.refused:
                return 2
            if name not in OUTSIDE and not name.startswith("cuCtx"):
                assert self.depth == 1, f"{name} without a context"
            self.do(name, arguments, plain)
            return 0

        return function

    def do(self, name: str, arguments: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
        first: Any = getattr(arguments[0], "_obj", None)
        match name:
            case "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
            case "cuDeviceGet":
                first.value = 40 + plain[1]
            case "cuDeviceGetUuid_v2":
                first.bytes[:] = list(DEVICE)
            case "cuDevicePrimaryCtxRetain":
                first.value = 0xC0
                self.retained += 1
            case "cuDevicePrimaryCtxRelease_v2":
                self.retained -= 1
            case "cuCtxPushCurrent_v2":
                assert plain == (0xC0,)
                self.depth += 1
            case "cuCtxPopCurrent_v2":
                self.depth -= 1
            case "cuStreamCreate":
                first.value = 0x57
                self.streams += 1
            case "cuStreamDestroy_v2":
                self.streams -= 1
            case "cuMemAlloc_v2":
                first.value = MADE
                self.memory.add(MADE)
            case "cuMemFree_v2":
                self.memory.remove(plain[0])
            case "cuIpcGetMemHandle":
                first.reserved[:] = list(HANDLE)
            case "cuIpcOpenMemHandle_v2":
                assert bytes(arguments[1].reserved) == HANDLE
                first.value = MAPPED
                self.opened.add(MAPPED)
            case "cuIpcCloseMemHandle":
                self.opened.remove(plain[0])
            case "cuMemGetAddressRange_v2":
                first.value, arguments[1]._obj.value = MAPPED, 1 << 22

    def names(self) -> list[str]:
        """What was called since the last time, contexts apart."""
        names = [name for name, _ in self.calls if not name.startswith("cuCtx")]
        self.calls.clear()
        return names


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def driver(library: Library) -> LibCuda:
    driver = LibCuda(1, library=library)
    assert ("cuDeviceGetUuid_v2", (library.calls[2][1][0], 41)) == library.calls[2]
    library.calls.clear()
    return driver


def test_every_context_that_is_pushed_is_popped_also_after_a_refusal(library: Library, driver: LibCuda) -> None:
    assert driver.uuid == DEVICE
    assert library.depth == 0
    library.refused = {"cuStreamSynchronize", "cuMemcpyHtoDAsync_v2"}
    for use in (driver.synchronise, lambda: driver.copy_in(1, 2, 3)):
        with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            use()
        assert library.depth == 0


def test_memory_is_zeros_before_anybody_gets_a_handle(library: Library, driver: LibCuda) -> None:
    assert driver.mem_alloc(1 << 21) == MADE
    assert ("cuMemsetD8Async", (MADE, 0, 1 << 21, 0x57)) in library.calls
    assert library.names() == ["cuMemAlloc_v2", "cuMemsetD8Async", "cuStreamSynchronize"]
    assert driver.get_handle(MADE) == HANDLE
    driver.mem_free(MADE)
    assert not library.memory


@pytest.mark.parametrize("refused", ["cuMemsetD8Async", "cuStreamSynchronize"])
def test_memory_that_cannot_be_cleared_is_not_kept(refused: str, library: Library, driver: LibCuda) -> None:
    library.refused = {refused}
    with pytest.raises(DeviceError, match=refused):
        driver.mem_alloc(1 << 21)
    assert not library.memory


def test_the_size_of_what_is_opened_is_the_drivers_word(library: Library, driver: LibCuda) -> None:
    assert driver.open_handle(HANDLE) == DeviceMemory(MAPPED, 1 << 22)
    driver.close_handle(MAPPED)
    assert not library.opened
    library.refused = {"cuMemGetAddressRange_v2"}
    with pytest.raises(DeviceError):
        driver.open_handle(HANDLE)
    assert not library.opened


def test_copies_go_the_way_that_they_say_on_one_stream(library: Library, driver: LibCuda) -> None:
    driver.copy_in(10, 20, 30)
    driver.copy_out(40, 50, 60)
    driver.synchronise()
    assert [call for call in library.calls if not call[0].startswith("cuCtx")] == [
        ("cuMemcpyHtoDAsync_v2", (10, 20, 30, 0x57)),
        ("cuMemcpyDtoHAsync_v2", (40, 50, 60, 0x57)),
        ("cuStreamSynchronize", (0x57,)),
    ]


def test_memory_of_the_host_that_is_not_locked_is_no_error(library: Library, driver: LibCuda) -> None:
    assert driver.lock(100, 200)
    driver.unlock(100)
    library.refused = {"cuMemHostRegister_v2"}
    assert not driver.lock(100, 200)


def test_closing_gives_back_stream_and_context_once(library: Library, driver: LibCuda) -> None:
    for _ in range(2):
        driver.close()
    assert (library.streams, library.retained, library.depth) == (0, 0, 0)
    with pytest.raises(DeviceError, match="after it was closed"):
        driver.synchronise()


@pytest.mark.parametrize("refused", ["cuStreamCreate", "cuCtxPushCurrent_v2"])
def test_a_start_that_fails_keeps_no_context(refused: str) -> None:
    library = Library(refused)
    with pytest.raises(DeviceError, match=refused):
        LibCuda(0, library=library)
    assert library.retained == 0


@pytest.mark.parametrize("refused", ["cuInit", "cuDeviceGet", "cuDeviceGetUuid_v2", "cuDevicePrimaryCtxRetain"])
def test_a_device_that_is_not_there_is_named_by_the_driver(refused: str) -> None:
    with pytest.raises(DeviceError, match=f"refused {refused}: CUDA_ERROR"):
        LibCuda(7, library=Library(refused))


def test_a_library_without_one_of_the_functions_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "LIBRARY", "libc.so.6")
    with pytest.raises(DeviceError, match="too old for cuda addresses"):
        libcuda.load()


def test_structures_have_the_sizes_of_the_header() -> None:
    assert ctypes.sizeof(libcuda._Handle) == 64
    assert ctypes.sizeof(libcuda._Uuid) == 16
