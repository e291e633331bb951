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
from tsqp.wire.payload import WireFormat

Run = Callable[[], object]
Bind = Callable[[torch.Tensor, torch.Tensor], Run]  # the product of an input and into an output that stay
Key = tuple[object, ...]


class Place(NamedTuple):
    """A tensor (rows, columns) as bytes in the memory that the transport gives: it stays, and its content changes."""

    memory: memoryview
    dtype: torch.dtype
    shape: tuple[int, int]


class Backend(Protocol):
    """One device. One thread uses it, and one call after another: each is ended by ``settle``."""

    @property
    def device(self) -> torch.device: ...

    @property
    def compiled_calls(self) -> bool:
        """Whether calls that come again can be answered by compiled loops, in the memory that the transport gives."""

    @property
    def compiles_one_row(self) -> bool:
        """Whether a product of one row is worth a graph of torch.compile."""

    def serving(self) -> AbstractContextManager[None]:
        """Around all that a worker computes: what a thread needs to be set up for it."""

    def attach(self, peer: bytes, memory: memoryview) -> None:
        """All payloads and products of a connection lie in this memory. Attaching again is allowed."""

    def detach(self, peer: bytes) -> None:
        """A connection is over: let go of its memory, and of what nothing on the device needs any more."""

    def field_weights(self, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        """One matrix int8 (N, K), read on the CPU, as this device multiplies by it."""

    def stage_in(self, payload: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A payload as a tensor on the device, which may alias it. Raises ProtocolError for one of another size."""

    def floats_in(
        self, payload: memoryview, wire: WireFormat, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The same for floats in a wire format, as ``dtype``."""

    def place(self, out: memoryview | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Where to compute a product so that it lies in ``out``; None where it has to be staged out.

        Raises ProtocolError for room of another size.
        """

    def stage_out(self, product: torch.Tensor, out: memoryview | None) -> memoryview:
        """A product's bytes: in ``out`` where that is given. They are there when ``settle`` has returned."""

    def floats_out(self, product: torch.Tensor, wire: WireFormat, out: memoryview | None) -> memoryview:
        """The same in a wire format."""

    def prepare(self, key: Key, x: Place, y: Place, bind: Bind) -> Run | None:
        """What does a product again: of whatever lies in ``x.memory`` then, into ``y.memory``; None where nothing can.

        Equal keys have products by the same weights; row i of a product depends on row i of its input alone.
        """

    def settle(self) -> None:
        """Wait until all payloads have been read and all products written: the only wait of a call."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that the device has no room for something."""

    def trim(self) -> None:
        """Give back device memory that nothing uses."""

    def close(self) -> None:
        """Let go of every connection's memory. Closing twice is allowed."""
