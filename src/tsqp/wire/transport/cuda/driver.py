"""What both ends of a CUDA IPC connection ask of CUDA. ``libcuda.py`` asks the driver; tests have a fake.

Copies are queued on one stream of this driver, and are done when ``synchronise`` has returned, in any order until then.
Addresses of hosts and devices are plain numbers. One thread uses a driver.
"""

from __future__ import annotations

from typing import Protocol

from tsqp.wire.device_memory import DeviceMemory

HANDLE_BYTES = 64
UUID_BYTES = 16


class IpcDriver(Protocol):
    """One device of this process. Every method raises DeviceError for what the driver does not do."""

    @property
    def uuid(self) -> bytes:
        """What names the device, to every process: 16 bytes."""

    @property
    def opens_own_handles(self) -> bool:
        """Whether a process can open the handle of its own memory. CUDA cannot."""

    def mem_alloc(self, size: int) -> int:
        """The address of fresh zeros that lie in an allocation of their own. ``size`` is a multiple of 2 MiB."""

    def mem_free(self, address: int) -> None:
        """Undo ``mem_alloc``, once the other side has closed the handle."""

    def get_handle(self, address: int) -> bytes:
        """The 64 bytes by which another process opens memory of ``mem_alloc``."""

    def open_handle(self, handle: bytes) -> DeviceMemory:
        """All of another process's allocation, by the driver's word on its size."""

    def close_handle(self, address: int) -> None:
        """Undo ``open_handle``. No work of this process uses the memory any more."""

    def lock(self, host: int, size: int) -> bool:
        """Lock memory of the host, so that the device copies by itself; whether the driver does that."""

    def unlock(self, host: int) -> None:
        """Undo ``lock``."""

    def copy_in(self, device: int, host: int, size: int) -> None:
        """Queue a copy to the device."""

    def copy_out(self, host: int, device: int, size: int) -> None:
        """Queue a copy from the device."""

    def synchronise(self) -> None:
        """Wait for all that was queued."""


def uuid_text(uuid: bytes) -> str:
    """A device's UUID as ``nvidia-smi -L`` writes it."""
    digits = uuid.hex()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
