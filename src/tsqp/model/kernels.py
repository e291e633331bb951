"""The element-wise operators of a layer, each in one pass over memory.

torch makes a pass for every step of a norm or a rotation; here each is one loop, compiled by numba for bfloat16 and
float32 on the CPU. ``TorchKernels`` says plainly what is computed, for every dtype and device, and the tests hold the
two together. Results go straight where they are needed: ``out`` may be memory that a transport sends from, keys and
values go into the cache.

Rows are counted by ``shape[0]``: ``len`` of a tensor runs Python code of torch, microseconds of a decode step.

numba compiles a loop for a dtype when it first runs, about a second in all, so ``pick_kernels`` runs each once;
``tsqp.arith.jit`` can keep the compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from tsqp.arith.bits import Array, bits
from tsqp.arith.row_threads import row_threads
from tsqp.model.batch import SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.norms import rms_norm, silu_mul
from tsqp.model.rotary import rotate

SPLIT_ROWS = 128  # fewer rows than this are done by one thread: waking another takes longer


class Heads(NamedTuple):
    """Rows (T, width) that hold some heads one after another, from ``column`` on."""

    rows: torch.Tensor
    column: int


class Kernels(Protocol):
    """Element-wise operators; T rows, float tensors of one dtype, statistics in float32."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """``out = x / rms(x) * weight``, all (T, hidden)."""

    def add_rms_norm(
        self, hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """``hidden += y`` in place, then ``out = hidden / rms(hidden) * weight``, all (T, hidden)."""

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = silu(gate) · up`` of the two halves of (T, 2·inner): out (T, inner)."""

    def widen(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``out = x``, both (T, n), out of float32."""

    def rotate(
        self, x: torch.Tensor, column: int, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        """``out[:, position:]`` = heads of ``x`` rotated by their positions' tables, cos and sin (T, head_dim).

        x (T, width) holds the heads one after another from ``column`` on; out (heads, ≥ position + T, head_dim), which
        may be of a dtype of its own.
        """

    def store(
        self,
        layer: int,
        queries: Heads,
        keys: Heads,
        values: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q: torch.Tensor,
        spans: Sequence[SequenceRows[KVCache]],
    ) -> None:
        """Queries of every row, rotated as by ``rotate``, to q (heads, T, head_dim), of the caches' dtype.

        Keys, rotated alike, and values to ``layer`` of the row's sequence's cache.
        """


class TorchKernels:
    """What the operators are, in plain torch: every dtype, every device, and the reference of the compiled ones."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(rms_norm(x, weight, eps))

    def add_rms_norm(
        self, hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        hidden.add_(y)
        out.copy_(rms_norm(hidden, weight, eps))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(silu_mul(gate_up))

    def widen(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

    def rotate(
        self, x: torch.Tensor, column: int, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        heads, _, head_dim = out.shape
        split = x[:, column : column + heads * head_dim].view(-1, heads, head_dim)
        out[:, position : position + len(x)] = rotate(split, cos, sin).transpose(0, 1)

    def store(
        self,
        layer: int,
        queries: Heads,
        keys: Heads,
        values: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q: torch.Tensor,
        spans: Sequence[SequenceRows[KVCache]],
    ) -> None:
        self.rotate(*queries, cos, sin, q, 0)
        for span in spans:
            at = span.slice
            k, v = span.cache.reserve(layer, span.end)
            self.rotate(keys.rows[at], keys.column, cos[at], sin[at], k, span.position)
            rows = values.rows[at, values.column : values.column + k.shape[0] * k.shape[2]]
            v[:, span.position : span.end] = rows.view(-1, k.shape[0], k.shape[2]).transpose(0, 1)


class CompiledKernels(TorchKernels):
    """The same for bfloat16 and float32 on the CPU, compiled. bfloat16 travels as uint16, which numba knows."""

    def __init__(self) -> None:
        from tsqp.model import compiled

        self._compiled = compiled
        self._threads = row_threads()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.rms_norm, x.shape[0], bits(x), bits(weight), eps, bits(out), least=SPLIT_ROWS)

    def add_rms_norm(
        self, hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        self._threads.run(
            self._compiled.add_rms_norm,
            hidden.shape[0],
            bits(hidden),
            bits(y),
            bits(weight),
            eps,
            bits(out),
            least=SPLIT_ROWS,
        )

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.silu_mul, out.shape[0], bits(gate_up), bits(out), least=SPLIT_ROWS)

    def widen(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.widen, out.shape[0], bits(x), bits(out), least=SPLIT_ROWS)

    def rotate(
        self, x: torch.Tensor, column: int, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        self._threads.run(
            self._compiled.rotate,
            x.shape[0],
            bits(x),
            column,
            bits(cos),
            bits(sin),
            bits(out),
            position,
            least=SPLIT_ROWS,
        )

    def store(
        self,
        layer: int,
        queries: Heads,
        keys: Heads,
        values: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q: torch.Tensor,
        spans: Sequence[SequenceRows[KVCache]],
    ) -> None:
        several = [span for span in spans if span.rows > 1]
        if several:
            super().store(layer, queries, keys, values, cos, sin, q, several)
        ones = [span for span in spans if span.rows == 1]
        if not ones:
            return
        for span in ones:
            k, _ = span.cache.reserve(layer, span.end)
        # By address: the spans keep the caches, and nothing grows them before the loop is done.
        table = np.array([(span.first, *span.cache.memory(layer), span.position) for span in ones], np.int64)
        self.store_rows(queries, keys, values, cos, sin, q, k, table)

    def store_rows(
        self,
        queries: Heads,
        keys: Heads,
        values: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q: torch.Tensor,
        like: torch.Tensor,
        table: Array,
    ) -> None:
        """One row of each of several sequences; ``table`` is that of the loop, ``like`` keys of one of the caches."""
        heads = [part for one in (queries, keys, values) for part in (bits(one.rows), one.column)]
        arrays = (bits(cos), bits(sin), bits(q), bits(like), table)
        self._threads.run(self._compiled.store, len(table), *heads, *arrays, least=SPLIT_ROWS)


def pick_kernels(
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    compiled: bool = True,
    cache_dtype: torch.dtype | None = None,
) -> Kernels:
    """Compiled kernels for bfloat16 and float32 on the CPU unless told otherwise, else torch's.

    ``cache_dtype`` is what rotated keys are kept as, ``dtype`` unless told otherwise.
    """
    if compiled and dtype in (torch.bfloat16, torch.float32) and torch.device(device).type == "cpu":
        return _compiled_kernels(dtype, cache_dtype or dtype)
    return TorchKernels()


@cache
def _compiled_kernels(dtype: torch.dtype, cache_dtype: torch.dtype) -> CompiledKernels:
    """Kernels whose loops are compiled for ``dtype``: each has done one row, so that no forward pass waits for it."""
    kernels = CompiledKernels()
    row, out, weight = (torch.zeros(*shape, dtype=dtype) for shape in ((1, 2), (1, 2), (2,)))
    kernels.rms_norm(row, weight, 1.0, out)
    kernels.add_rms_norm(row, row.clone(), weight, 1.0, out)
    kernels.silu_mul(torch.zeros(1, 4, dtype=dtype), out)
    kernels.widen(row, torch.empty(1, 2))
    kept, heads = out.view(1, 1, 2).to(cache_dtype), Heads(row, 0)
    kernels.rotate(*heads, row, row, kept, 0)
    kernels.store_rows(heads, heads, heads, row, row, kept, kept, np.zeros((0, 5), np.int64))
    return kernels
