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
from tsqp.arith.quantise import quantise_block
from tsqp.arith.row_threads import row_threads
from tsqp.config.model import Activation
from tsqp.model.batch import SequenceRows
from tsqp.model.cache import KVCache, query_dtype
from tsqp.model.norms import gelu_mul, layer_norm, relu_squared, rms_norm, silu_mul
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

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """``rms_norm`` of each row less its mean."""

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = silu(gate) · up`` of the two halves of (T, 2·inner): out (T, inner)."""

    def gelu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = gelu(gate) · up`` of the two halves of (T, 2·inner), gelu by tanh: out (T, inner)."""

    def relu_squared(self, up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = max(up, 0)²``, both (T, inner)."""

    def widen(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``out = x``, both (T, n), out of float32."""

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
        """Queries of every row, rotated by the tables of its position, to q (heads, T, head_dim).

        Keys, rotated alike, and values to ``layer`` of the cache of the row's sequence. cos and sin (T, head_dim). q is
        of the dtype that attention over the caches takes. ``spans`` are all of a chunk, in the order of their rows.
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

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(layer_norm(x, weight, eps))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(silu_mul(gate_up))

    def gelu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(gelu_mul(gate_up))

    def relu_squared(self, up: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(relu_squared(up))

    def widen(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

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
        q.copy_(rotate(_split(queries, q), cos, sin).transpose(0, 1))
        for span in spans:
            at = span.slice
            k, v = span.cache.reserve(layer, span.end)
            rotated = rotate(_split(keys, k)[at], cos[at], sin[at])
            for held, scales, new in zip(
                (k, v), span.cache.scales(layer), (rotated, _split(values, v)[at]), strict=True
            ):
                own = new.transpose(0, 1)  # (heads, rows, head_dim)
                if held.dtype == torch.int8:
                    own, scales[:, span.position : span.end] = _quantised(own)
                held[:, span.position : span.end] = own


def _split(x: Heads, like: torch.Tensor) -> torch.Tensor:
    """Heads as (T, heads, head_dim), as many and as wide as those of ``like`` (heads, n, head_dim)."""
    heads, _, head_dim = like.shape
    return x.rows[:, x.column : x.column + heads * head_dim].view(-1, heads, head_dim)


def _quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x (heads, rows, n) as int8 and their scales (heads, rows)."""
    values, scales = quantise_block(x.flatten(0, 1))
    return values.view(x.shape), scales.view(x.shape[:2])


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

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        loop = self._compiled.layer_norm
        self._threads.run(loop, x.shape[0], bits(x), bits(weight), eps, bits(out), least=SPLIT_ROWS)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.silu_mul, out.shape[0], bits(gate_up), bits(out), least=SPLIT_ROWS)

    def gelu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.gelu_mul, out.shape[0], bits(gate_up), bits(out), least=SPLIT_ROWS)

    def relu_squared(self, up: torch.Tensor, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.relu_squared, out.shape[0], bits(up), bits(out), least=SPLIT_ROWS)

    def widen(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._threads.run(self._compiled.widen, out.shape[0], bits(x), bits(out), least=SPLIT_ROWS)

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
        for span in spans:
            k, _ = span.cache.reserve(layer, span.end)
        # By address: the spans keep the caches, and nothing grows them before the loop is done.
        table = np.array([(span.first, *span.cache.memory(layer), span.position) for span in spans], np.int64)
        self.store_rows(queries, keys, values, cos, sin, q, k, table, spans[-1].first + spans[-1].rows)

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
        rows: int,
    ) -> None:
        """``rows`` rows; ``table`` is that of the loop, ``like`` keys of one of the caches."""
        loop = self._compiled.store_int8 if like.dtype == torch.int8 else self._compiled.store
        heads = [part for one in (queries, keys, values) for part in (bits(one.rows), one.column)]
        arrays = (bits(cos), bits(sin), bits(q), bits(like), table)
        self._threads.run(loop, rows, *heads, *arrays, least=SPLIT_ROWS)


def pick_kernels(
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    compiled: bool = True,
    cache_dtype: torch.dtype | None = None,
    activation: Activation = "silu",
    layer_norm: bool = False,
) -> Kernels:
    """Compiled kernels for bfloat16 and float32 on the CPU unless told otherwise, else torch's.

    ``cache_dtype`` is what keys and values are kept as, ``dtype`` unless told otherwise. The loop of ``activation`` is
    ready, and for ``layer_norm`` that of the norm; others are compiled when they are first used.
    """
    if compiled and dtype in (torch.bfloat16, torch.float32) and torch.device(device).type == "cpu":
        return _compiled_kernels(dtype, cache_dtype or dtype, activation, layer_norm)
    return TorchKernels()


@cache
def _compiled_kernels(
    dtype: torch.dtype, cache_dtype: torch.dtype, activation: Activation, layer_norm: bool
) -> CompiledKernels:
    """Kernels whose loops are compiled for ``dtype``: each has done one row, so that no forward pass waits for it."""
    kernels = CompiledKernels()
    row, out, weight = (torch.zeros(*shape, dtype=dtype) for shape in ((1, 2), (1, 2), (2,)))
    kernels.rms_norm(row, weight, 1.0, out)
    kernels.add_rms_norm(row, row.clone(), weight, 1.0, out)
    if layer_norm:
        kernels.layer_norm(row, weight, 1.0, out)
    match activation:
        case "silu":
            kernels.silu_mul(torch.zeros(1, 4, dtype=dtype), out)
        case "gelu_tanh":
            kernels.gelu_mul(torch.zeros(1, 4, dtype=dtype), out)
        case "relu2":
            kernels.relu_squared(row, out)
    kernels.widen(row, torch.empty(1, 2))
    heads, like = Heads(row, 0), out.view(1, 1, 2).to(cache_dtype)
    q = like.to(query_dtype(cache_dtype))
    kernels.store_rows(heads, heads, heads, row, row, q, like, np.zeros((0, 7), np.int64), 0)
    return kernels
