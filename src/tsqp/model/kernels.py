"""The element-wise operators of a layer, each in one pass over memory.

torch makes a pass for every step of a norm or a rotation; here each is one loop, compiled by numba for bfloat16 on the
CPU. ``TorchKernels`` says plainly what is computed, for every dtype and device, and the tests hold the two together.
Results go straight where they are needed: ``out`` may be memory that a transport sends from, keys and values go into
the cache.

numba compiles when it first sees a function, about a second in all. ``enable_cache`` keeps the compiled code on disk:
it is code that this process loads, so the directory must be one that nobody else can write.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from tsqp.model.norms import rms_norm, silu_mul
from tsqp.model.rotary import rotate

SPLIT_ROWS = 128  # fewer rows than this are done by one thread: waking another takes longer


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

    def rotate(
        self, x: torch.Tensor, column: int, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        """``out[:, position:]`` = heads of ``x`` rotated by their positions' tables, cos and sin (T, head_dim).

        x (T, width) holds the heads one after another from ``column`` on; out (heads, ≥ position + T, head_dim).
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

    def rotate(
        self, x: torch.Tensor, column: int, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        heads, _, head_dim = out.shape
        split = x[:, column : column + heads * head_dim].view(-1, heads, head_dim)
        out[:, position : position + len(x)] = rotate(split, cos, sin).transpose(0, 1)


class CompiledKernels:
    """The same for bfloat16 on the CPU, compiled. bfloat16 travels as uint16, which numba knows."""

    def __init__(self) -> None:
        from tsqp.model import compiled

        self._compiled = compiled
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="tsqp-kernel")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        self._rows(self._compiled.rms_norm, len(x), bits(x), bits(weight), eps, bits(out))

    def add_rms_norm(
        self, hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        self._rows(self._compiled.add_rms_norm, len(hidden), bits(hidden), bits(y), bits(weight), eps, bits(out))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._rows(self._compiled.silu_mul, len(out), bits(gate_up), bits(out))

    def rotate(
        self, x: torch.Tensor, column: int, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        self._rows(self._compiled.rotate, len(x), bits(x), column, bits(cos), bits(sin), bits(out), position)

    def _rows(self, kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
        """Run a kernel over all rows, in equal parts on as many threads as torch uses."""
        parts = self._threads if rows >= SPLIT_ROWS else 1
        edges = [rows * part // parts for part in range(parts + 1)]
        others = [self._pool.submit(kernel, *arguments, edges[i], edges[i + 1]) for i in range(1, parts)]
        kernel(*arguments, edges[0], edges[1])
        for other in others:
            other.result()


def bits(tensor: torch.Tensor) -> Any:
    """A bfloat16 tensor's memory as a numpy array of uint16."""
    return tensor.view(torch.uint16).numpy()


def pick_kernels(dtype: torch.dtype, device: str | torch.device = "cpu", *, compiled: bool = True) -> Kernels:
    """Compiled kernels for bfloat16 on the CPU unless told otherwise, else torch's."""
    if compiled and dtype == torch.bfloat16 and torch.device(device).type == "cpu":
        return _compiled_kernels()
    return TorchKernels()


@cache
def _compiled_kernels() -> CompiledKernels:
    """One for the process, with one pool of threads."""
    return CompiledKernels()


def enable_cache(directory: Path) -> None:
    """Keep compiled kernels in ``directory``, made with mode 0700. Call it before the first kernel is picked.

    Whoever can write there runs code in this process.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["NUMBA_CACHE_DIR"] = str(directory)
