"""What a CUDA backend asks of a driver: the only calls that need a GPU. ``torch_driver.py`` makes them.

Work on one stream is done in its order, and work on different streams in any order that no event forbids. Queueing work
returns at once; only ``synchronise`` waits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol

import torch

from tsqp.wire.device_memory import DeviceMemory


class Stream(Enum):
    """Queues of work: one for each direction of copies, and one that computes."""

    IN = "in"
    COMPUTE = "compute"
    OUT = "out"


class Event(Protocol):
    """A point in a stream's work."""


class Pool(Protocol):
    """What graphs share; see Driver.new_pool."""


class Graph(Protocol):
    """Work that was captured and can be queued again as one."""

    def replay(self) -> None:
        """Queue it on COMPUTE."""


class Driver(Protocol):
    """One device. "Memory" is a uint8 tensor (n,) on the host, "device memory" one on the device."""

    @property
    def device(self) -> torch.device: ...

    def serving(self) -> AbstractContextManager[None]:
        """From here on torch's own operators go to COMPUTE, after whatever this thread has queued before."""

    def register(self, memory: torch.Tensor) -> str | None:
        """Lock memory for copies that the device makes itself; why that was refused, in a few words, or None."""

    def unregister(self, memory: torch.Tensor) -> None:
        """Undo ``register``, of the same memory, in which no copy is under way."""

    def locked(self, size: int) -> torch.Tensor:
        """Fresh memory that is locked from the beginning. Raises RuntimeError."""

    def empty(self, size: int, stream: Stream) -> torch.Tensor:
        """Fresh device memory, to be written on ``stream`` first. Raises torch.OutOfMemoryError."""

    def alias(self, memory: DeviceMemory) -> torch.Tensor:
        """Memory of this device that is not torch's, as device memory that is never freed here; read on COMPUTE."""

    def uses(self, memory: torch.Tensor, stream: Stream) -> None:
        """Work on a further stream uses this device memory: it is not given away before that work is done."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Queue a copy between device memory and a piece of locked memory, one registration of it, either way.

        On COMPUTE also between device memory and memory of ``alias``.
        """

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Queue a copy of device memory (rows, width) to locked memory of that shape, whose rows may lie apart."""

    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        """The point that a stream's work has come to once all that was queued so far is done; ``timed``: and when."""

    def elapsed_ns(self, begin: Event, end: Event) -> int:
        """The time between two timed events that were waited for, of any streams. Raises RuntimeError."""

    def wait_on(self, stream: Stream, event: Event) -> None:
        """What is queued on a stream from here on is done after the event."""

    def done(self, event: Event) -> bool:
        """Whether ``synchronise`` has nothing to wait for. Raises RuntimeError for what has failed on the device."""

    def synchronise(self, event: Event) -> None:
        """Wait for an event. Raises RuntimeError for what has failed on the device."""

    def new_pool(self) -> Pool:
        """Memory for graphs of which no two run at the same time. It ends with the last of them, and is of no use then.

        So a graph that has it must be kept while another is captured there.
        """

    def capture(self, work: Callable[[], object], pool: Pool) -> Graph:
        """Run work of torch's operators once, then capture it. Raises RuntimeError where it cannot be captured."""

    def trim(self) -> None:
        """Give back device memory that torch keeps for later."""
