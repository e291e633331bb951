"""The operators of a layer in as few launches as torch has for them: on a device each launch costs a step some time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsqp.model.kernels import TorchKernels


class DeviceKernels(TorchKernels):
    """See Kernels. On CUDA a norm is one kernel (torch 2.9 and later), and is rounded once, not twice."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(F.rms_norm(x, weight.shape, weight, eps))

    def add_rms_norm(
        self, hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        self.rms_norm(hidden.add_(y), weight, eps, out)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), up, out=out)
