"""A CUDA device: payloads are copied in, products out, on streams of their own beside the one that computes.

The order of work is said by events, and the host waits once for each call, in ``settle``. Products of few rows that
come again are graphs, with their copies on the same stream: there is nothing that those could overlap with, and an
event between two streams would only cost time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.product import DigitKernel
from tsqp.arith.tensor_cores import DeviceFieldWeights
from tsqp.untrusted.backends.base import Bind, Key, Place, Run
from tsqp.untrusted.backends.driver import Driver, Event, Stream
from tsqp.untrusted.backends.graphs import Captured, Graphs
from tsqp.untrusted.backends.host_memory import Arenas, Buffers
from tsqp.wire.payload import WireFormat, bytes_tensor, check_size, tensor_bytes

STAGED_BYTES = 256 << 20  # of payloads in buffers, before a call waits for the first of them to be copied


class CudaBackend:
    """See Backend."""

    compiled_calls = False
    compiles_one_row = True

    def __init__(self, driver: Driver, *, arenas: Arenas | None = None) -> None:
        self.device = driver.device
        self._driver = driver
        self._arenas = arenas or Arenas(driver)
        self._graphs = Graphs(driver)
        self._sources, self._targets = Buffers(driver), Buffers(driver)
        self._unsent: list[tuple[memoryview, torch.Tensor]] = []  # what settle writes, and the buffers it is in
        self._last: Event | None = None  # after it, all that the current call has queued is done

    def serving(self) -> AbstractContextManager[None]:
        return self._driver.serving()

    def attach(self, peer: bytes, memory: memoryview) -> None:
        self._arenas.attach(peer, memory)

    def detach(self, peer: bytes) -> None:
        self.settle()  # no copy is under way in memory that is unlocked
        self._arenas.detach(peer)
        self._driver.trim()

    def field_weights(self, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        return DeviceFieldWeights.of(wq.to(self.device), kernel)

    def stage_in(self, payload: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not (size := check_size(payload, dtype, shape)):
            return torch.empty(shape, dtype=dtype, device=self.device)
        source = self._source(payload)
        raw = self._driver.empty(size, Stream.IN)
        self._driver.uses(raw, Stream.COMPUTE)
        self._copy(raw, source, Stream.IN, inwards=True)
        self._last = self._driver.record(Stream.IN)
        self._driver.wait_on(Stream.COMPUTE, self._last)
        return raw.view(dtype).view(shape)

    def floats_in(
        self, payload: memoryview, wire: WireFormat, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        if wire.dtype is None:
            return wire.unpack(self.stage_in(payload, torch.uint8, (wire.size(shape),)), shape, dtype)
        return wire.unpack(self.stage_in(payload, wire.dtype, shape), shape, dtype)

    def place(self, out: memoryview | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        if out is not None:
            check_size(out, dtype, shape)
        return None

    def stage_out(self, product: torch.Tensor, out: memoryview | None) -> memoryview:
        raw = product.contiguous().view(-1).view(torch.uint8)
        if out is None:
            out = tensor_bytes(torch.empty(len(raw), dtype=torch.uint8))
        if check_size(out, torch.uint8, tuple(raw.shape)):
            self._driver.uses(raw, Stream.OUT)
            self._driver.wait_on(Stream.OUT, self._driver.record(Stream.COMPUTE))
            self._copy(raw, self._target(out), Stream.OUT, inwards=False)
            self._last = self._driver.record(Stream.OUT)
        return out

    def floats_out(self, product: torch.Tensor, wire: WireFormat, out: memoryview | None) -> memoryview:
        return self.stage_out(wire.pack(product), out)

    def prepare(self, key: Key, x: Place, y: Place, bind: Bind) -> Run | None:
        rows = x.shape[0]
        if not (check_size(*x) and check_size(*y)):
            return None
        captured = self._graphs.of(key, rows, (x.dtype, x.shape[1]), (y.dtype, y.shape[1]), bind)
        if captured is None:
            return None
        pieces = self._arenas.pieces(x.memory), self._arenas.pieces(y.memory)
        return partial(self._again, captured, x.memory, y.memory, *pieces)

    def settle(self) -> None:
        last, self._last = self._last, None
        unsent, self._unsent = self._unsent, []
        if last is None:
            return
        self._driver.synchronise(last)
        for out, buffer in unsent:
            out[:] = tensor_bytes(buffer)
        self._sources.release()
        self._targets.release()

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(error)  # libraries and locked memory have no class of their own for it
        return isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)

    def trim(self) -> None:
        self._driver.trim()

    def close(self) -> None:
        self.settle()
        self._arenas.close()

    def _again(
        self,
        captured: Captured,
        source: memoryview,
        target: memoryview,
        sources: Sequence[torch.Tensor] | None,
        targets: Sequence[torch.Tensor] | None,
    ) -> None:
        """Copy in, multiply, copy out, in this order on one stream. Pieces are None for memory that is not locked."""
        x, y = captured.x[: source.nbytes], captured.y[: target.nbytes]
        self._copy(x, sources or self._source(source), Stream.COMPUTE, inwards=True)
        captured.graph.replay()
        self._copy(y, targets or self._target(target), Stream.COMPUTE, inwards=False)
        self._last = self._driver.record(Stream.COMPUTE)

    def _copy(self, device: torch.Tensor, host: Sequence[torch.Tensor], stream: Stream, *, inwards: bool) -> None:
        at = 0
        for piece in host:
            part = device[at : at + len(piece)]
            at += len(piece)
            if inwards:
                self._driver.copy(part, piece, stream)
            else:
                self._driver.copy(piece, part, stream)

    def _source(self, payload: memoryview) -> list[torch.Tensor]:
        """Locked memory with the payload's bytes: where it lies, or a buffer to which it is copied now."""
        pieces = self._arenas.pieces(payload)
        if pieces is not None:
            return pieces
        if self._last is not None and self._sources.taken_bytes + payload.nbytes > STAGED_BYTES:
            self._driver.synchronise(self._last)
            self._sources.release()
        buffer = self._sources.take(payload.nbytes)
        buffer.copy_(bytes_tensor(payload, torch.uint8, (payload.nbytes,)))
        return [buffer]

    def _target(self, out: memoryview) -> list[torch.Tensor]:
        """Locked memory for a product: where it is to lie, or a buffer from which ``settle`` copies it there."""
        pieces = self._arenas.pieces(out)
        if pieces is not None:
            return pieces
        buffer = self._targets.take(out.nbytes)
        self._unsent.append((out, buffer))
        return [buffer]
