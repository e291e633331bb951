"""``--compile`` on a device: norms and activations as one pass over memory each, by torch.compile.

A step of torch is a launch of its own; what torch.compile makes of a norm is one. Rotation and the stores to the caches
stay as they are: their places are other memory for each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tsqp.config.model import ModelConfig
from tsqp.model.kernels import TorchKernels
from tsqp.model.norms import gelu_mul, layer_norm, relu_squared, rms_norm, silu_mul

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class FusedKernels(TorchKernels):
    """See Kernels. ``compile_one`` is torch.compile with its options: rows may be any number."""

    def __init__(self, compile_one: Compile) -> None:
        self._rms_norm = compile_one(_rms_norm)
        self._add_rms_norm = compile_one(_add_rms_norm)
        self._layer_norm = compile_one(_layer_norm)
        self._silu_mul = compile_one(_silu_mul)
        self._gelu_mul = compile_one(_gelu_mul)
        self._relu_squared = compile_one(_relu_squared)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        self._rms_norm(x, weight, eps, out)

    def add_rms_norm(
        self, hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        out.copy_(self._add_rms_norm(hidden, y, weight, eps))  # inductor of torch 2.13 fails on two results in place

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        self._layer_norm(x, weight, eps, out)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._silu_mul(gate_up, out)

    def gelu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._gelu_mul(gate_up, out)

    def relu_squared(self, up: torch.Tensor, out: torch.Tensor) -> None:
        self._relu_squared(up, out)

    def warm_up(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what a model needs, so that no call waits for it: for one row, and for any other number."""
        eps, norm = config.rms_norm_eps, self.layer_norm if config.layer_norm else self.rms_norm
        sizes = {config.hidden_size}
        if config.qk_norm:
            sizes |= {config.head_dim, config.q_size, config.kv_size}
        for rows in (1, 2, 3):  # one row is a graph of its own; the third shows that rows are dynamic
            for size in sizes:
                x = torch.zeros(rows, size, dtype=dtype, device=device)
                norm(x, x[0], eps, torch.empty_like(x))
            if not config.layer_norm:
                x = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
                self.add_rms_norm(x, x.clone(), x[0].clone(), eps, torch.empty_like(x))
            inner = torch.zeros(rows, config.intermediate_size, dtype=dtype, device=device)
            match config.activation:
                case "silu":
                    self.silu_mul(torch.cat((inner, inner), dim=1), inner)
                case "gelu_tanh":
                    self.gelu_mul(torch.cat((inner, inner), dim=1), inner)
                case "relu2":
                    self.relu_squared(inner.clone(), inner)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(rms_norm(x, weight, eps))


def _add_rms_norm(hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    hidden.add_(y)
    return rms_norm(hidden, weight, eps)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(layer_norm(x, weight, eps))


def _silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(silu_mul(gate_up))


def _gelu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(gelu_mul(gate_up))


def _relu_squared(up: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(relu_squared(up))
