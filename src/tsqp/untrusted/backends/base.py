"""The seam between a worker's calls and the device that computes them: see ``docs/gpu.md``.

A path checks a call and says what is multiplied; a backend says where tensors lie and how bytes get there and back.
Nothing else in ``untrusted/`` asks what kind of device it has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.product import DigitKernel
from tsqp.wire.device_memory import Payload
from tsqp.wire.messages import Stage
from tsqp.wire.payload import WireFormat

Run = Callable[[], object]
Finish = Callable[[], object]  # done by the host once a call's copies are
Bind = Callable[[torch.Tensor, torch.Tensor], Run]  # the product of an input and into an output that stay
Key = tuple[object, ...]
Stages = tuple[Stage, Stage, Stage]


class Place(NamedTuple):
    """A tensor (rows, columns) as bytes in the memory that the transport gives: it stays, and its content changes."""

    memory: Payload
    dtype: torch.dtype
    shape: tuple[int, int]


class Queued(Protocol):
    """All that one call has queued on its devices."""

    def done(self) -> bool:
        """Whether ``wait`` has nothing to wait for."""

    def wait(self) -> None:
        """Wait until its payloads have been read and its product is written. Raises RuntimeError for what has failed.

        Called once, in the order of the calls.
        """

    def stages(self) -> Stages | None:
        """After ``wait``: when copies in, computing and copies out began and ended, in ns from the first on.

        None where they are not known one by one. Raises RuntimeError.
        """


class NothingQueued:
    """See Queued: of a call that was done when it returned."""

    def done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def stages(self) -> None: ...


NOTHING_QUEUED = NothingQueued()


class Devices(Protocol):
    """All that a worker computes on.

    One thread uses it, and one call after another: each is ended by ``submit``, or by ``settle``.
    """

    @property
    def compiled_calls(self) -> bool:
        """Whether calls that come again can be answered by compiled loops, in the memory that the transport gives."""

    @property
    def failed(self) -> str:
        """The name of the device that the last error came from."""

    @property
    def depth(self) -> int:
        """How many calls may be queued together: 1 where each is done when it returns."""

    def serving(self) -> AbstractContextManager[None]:
        """Around all that a worker computes: what a thread needs to be set up for it."""

    def attach(self, peer: bytes, memory: memoryview) -> None:
        """All payloads and products of a connection lie in this memory. Attaching again is allowed."""

    def detach(self, peer: bytes) -> None:
        """A connection is over, and so are its calls: wait for the device, and let go of the connection's memory."""

    def submit(self) -> Queued:
        """End a call without waiting for it. The next one may begin, and has staging memory of its own."""

    def settle(self) -> None:
        """End a call and wait for it: all its payloads have been read, its product is written."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that the device has no room for something."""

    def works(self) -> bool:
        """Whether each device still does what it is asked, after an error: some errors a device keeps for good."""

    def trim(self) -> None:
        """Give back device memory that nothing uses."""

    def close(self) -> None:
        """Let go of every connection's memory. Closing twice is allowed."""


class Backend(Devices, Protocol):
    """One device, and what is computed on it.

    A payload, and the room for a product, is memory of the host, or over ``cuda`` memory of this device.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def captures(self) -> bool:
        """Whether work is queued here and done later, so that ``captured`` and ``stage_into`` are worth while."""

    @property
    def compiles_one_row(self) -> bool:
        """Whether a product of one row is worth a graph of torch.compile."""

    def field_weights(self, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        """One matrix int8 (N, K), read on the CPU, as this device multiplies by it."""

    def host_copy(self, payload: Payload) -> memoryview:
        """A payload's bytes for the host to look at: over device memory a copy, which is there when this returns."""

    def stage_in(self, payload: Payload, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A payload as a tensor on the device, which may alias it. Raises ProtocolError for one of another size."""

    def floats_in(self, payload: Payload, wire: WireFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The same for floats in a wire format, as ``dtype``."""

    def place(self, out: Payload | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Where to compute a product so that it lies in ``out``; None where it has to be staged out.

        Raises ProtocolError for room of another size.
        """

    def stage_out(self, product: torch.Tensor, out: Payload | None) -> Payload:
        """A product's bytes: in ``out`` where that is given.

        They are there when ``settle``, or ``wait`` of what was submitted, has returned.
        """

    def floats_out(self, product: torch.Tensor, wire: WireFormat, out: Payload | None) -> Payload:
        """The same in a wire format."""

    def prepare(self, key: Key, x: Place, y: Place, bind: Bind) -> Run | None:
        """What does a product again: of whatever lies in ``x.memory`` then, into ``y.memory``; None where nothing can.

        Equal keys have products by the same weights; row i of a product depends on row i of its input alone.
        """

    def stage_into(self, payload: memoryview, memory: torch.Tensor) -> None:
        """A payload into device memory that stays, after all that was computed there. Raises ProtocolError."""

    def captured(self, work: Run) -> Run:
        """Operators on memory that stays, as one launch; themselves where they cannot be captured.

        They run once, or twice, before this returns. Raises torch.OutOfMemoryError.
        """
