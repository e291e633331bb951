"""A CUDA device that has some columns of a product whose other columns are on other devices.

Its products go to their columns of the client's memory by 2D copies: rows lie closely on the device, and a pitch apart
on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from tsqp.untrusted.backends.base import Bind, Key, Place, Run
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.untrusted.backends.driver import Driver, Stream
from tsqp.untrusted.backends.graphs import Captured
from tsqp.untrusted.backends.host_memory import Arenas
from tsqp.wire.device_memory import Payload, on_the_host
from tsqp.wire.payload import bytes_tensor, check_size

MANY = "several devices"


class Columns(NamedTuple):
    """Columns of a product from ``first`` on, whose rows have ``of`` of them."""

    first: int
    of: int


class Strip(NamedTuple):
    """``width`` bytes from ``first`` on, in each row of ``pitch`` bytes: some columns of a product in memory."""

    memory: memoryview
    first: int
    width: int
    pitch: int

    @property
    def rows(self) -> int:
        return self.memory.nbytes // self.pitch


class Fragment(NamedTuple):
    """A part of a strip that lies in one piece of locked memory: ``host`` (rows, width), from ``row``, ``column`` on.

    ``column`` is counted in the strip's own bytes.
    """

    row: int
    column: int
    host: torch.Tensor


def fragments(pieces: Sequence[torch.Tensor], strip: Strip) -> Iterator[Fragment]:
    """A strip of memory that lies in pieces, uint8 (n,), one after another: no fragment crosses their borders."""
    begun = 0  # of a piece, in the memory
    for piece in pieces:
        end = begun + len(piece)
        row = begun // strip.pitch
        while row < strip.rows and row * strip.pitch + strip.first < end:
            start = row * strip.pitch + strip.first  # of the row's own bytes
            low, high = max(start, begun), min(start + strip.width, end)
            whole = (end - start - strip.width) // strip.pitch + 1 if low == start else 0
            rows = max(1, min(whole, strip.rows - row))
            if low < high:
                shape = (rows, high - low)
                host = piece.as_strided(shape, (strip.pitch, 1), piece.storage_offset() + low - begun)
                yield Fragment(row, low - start, host)
            row += rows
        begun = end


class ColumnsBackend(CudaBackend):
    """See Backend. Within ``columns`` the room for a product is that of the whole product."""

    def __init__(self, driver: Driver, *, arenas: Arenas) -> None:
        """``arenas`` are those of all devices: memory is locked once for all."""
        super().__init__(driver, arenas=arenas)
        self._columns: Columns | None = None

    @contextmanager
    def columns(self, first: int, of: int) -> Iterator[None]:
        """Products that are staged out or prepared in here are columns of wider ones, from ``first`` on."""
        self._columns = Columns(first, of)
        try:
            yield
        finally:
            self._columns = None

    def place(self, out: Payload | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        if self._columns is not None:
            shape = (*shape[:-1], self._columns.of)
        return super().place(out, dtype, shape)

    def stage_out(self, product: torch.Tensor, out: Payload | None) -> Payload:
        if self._columns is None or out is None:
            return super().stage_out(product, out)
        strip = self._strip(out, product.dtype, len(product), product.shape[1])
        raw = product.contiguous().view(torch.uint8)
        self._driver.uses(raw, Stream.OUT)
        self._driver.wait_on(Stream.OUT, self._driver.record(Stream.COMPUTE))
        self._send(raw, strip, self._fragments(strip), Stream.OUT)
        self._last = self._driver.record(Stream.OUT)
        return out

    def prepare(self, key: Key, x: Place, y: Place, bind: Bind) -> Run | None:
        if self._columns is None:
            return super().prepare(key, x, y, bind)
        rows, own = y.shape
        strip = self._strip(y.memory, y.dtype, rows, own)
        source = on_the_host(x.memory, MANY)
        if not check_size(*x):
            return None
        captured = self._graphs.of(key, rows, (x.dtype, x.shape[1]), (y.dtype, own), bind)
        if captured is None:
            return None
        return partial(
            self._again_in_columns, captured, source, self._arenas.pieces(source), strip, self._fragments(strip)
        )

    def _strip(self, out: Payload, dtype: torch.dtype, rows: int, own: int) -> Strip:
        """Raises ProtocolError for room that is not that of the whole product, or not of the host."""
        if self._columns is None:
            raise ValueError("there are no columns outside of columns()")
        check_size(out, dtype, (rows, self._columns.of))
        size = dtype.itemsize
        return Strip(on_the_host(out, MANY), self._columns.first * size, own * size, self._columns.of * size)

    def _fragments(self, strip: Strip) -> list[Fragment] | None:
        """None for memory that is not locked."""
        pieces = self._arenas.pieces(strip.memory)
        return None if pieces is None else list(fragments(pieces, strip))

    def _again_in_columns(
        self,
        captured: Captured,
        source: memoryview,
        sources: Sequence[torch.Tensor] | None,
        strip: Strip,
        targets: Sequence[Fragment] | None,
    ) -> None:
        """As in ``CudaBackend``, on one stream."""
        x, y = captured.x[: source.nbytes], captured.y[: strip.rows * strip.width]
        self._copy(x, sources or self._source(source), Stream.COMPUTE, inwards=True)
        captured.graph.replay()
        self._send(y.view(strip.rows, strip.width), strip, targets, Stream.COMPUTE)
        self._last = self._driver.record(Stream.COMPUTE)

    def _send(self, raw: torch.Tensor, strip: Strip, targets: Sequence[Fragment] | None, stream: Stream) -> None:
        """Queue the copies of a product's bytes (rows, width) to its strip, or to a buffer first."""
        if targets is None:
            buffer = self._targets.take(raw.numel())
            self._driver.copy(buffer, raw.view(-1), stream)
            self._unsent.append(partial(_spread, buffer, strip))
            return
        for row, column, host in targets:
            rows, width = host.shape
            part = raw[row : row + rows, column : column + width]
            if rows == 1 or width == strip.pitch:
                self._driver.copy(host.reshape(-1), part.reshape(-1), stream)
            else:
                self._driver.copy_rows(host, part, stream)


def _spread(buffer: torch.Tensor, strip: Strip) -> None:
    """Rows that lie closely, to their columns."""
    whole = bytes_tensor(strip.memory, torch.uint8, (strip.rows, strip.pitch))
    whole[:, strip.first : strip.first + strip.width] = buffer.view(strip.rows, strip.width)
