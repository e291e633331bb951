"""Which product of 8-bit digits is exact on this machine: decided by a test with random digits, once.

Digits that are all extreme would not do: saturating arithmetic passes them.
"""

from __future__ import annotations

from functools import cache

import torch
from numba.core.errors import NumbaError

from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.many_rows import ManyRowsKernel
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel, DigitKernel, OffsetKernel


@cache
def pick_kernel(device: torch.device) -> DigitKernel:
    """The first fast kernel whose self-test passes on this machine, otherwise the blocked one."""
    return next((kernel for kernel in fast_kernels(device) if is_exact(kernel, device)), BlockedKernel())


def fast_kernels(device: torch.device) -> list[DigitKernel]:
    """What may be exact on this machine, the fastest first."""
    if device.type == "cuda":
        from tsqp.arith.tensor_cores import TensorCoreKernel

        return [TensorCoreKernel()]
    return [kind() for kind in (ManyRowsKernel, FewRowsKernel) if kind.supported()] + [OffsetKernel()]


def is_exact(kernel: DigitKernel, device: torch.device) -> bool:
    """Whether products of random digits are those of int64 arithmetic, and mod p: for one row, few and many.

    Compiles the kernel's loops, so that no product waits for that.
    """
    generator = torch.Generator().manual_seed(0)  # a fixed test: what it looks for fails on almost any digits
    w = torch.randint(-127, 128, (264, 1_160), dtype=torch.int8, generator=generator)
    try:
        return _exact_sums(kernel, device, w, generator) and _exact_mod_p(kernel, device, w, generator)
    except (RuntimeError, NumbaError):  # not implemented on this device
        return False


def exact_product(kernel: DigitKernel, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x·wᵀ for digits x int8 (T, K) and w int8 (N, K): int32 (T, N)."""
    return kernel.accumulate(x, w) - kernel.offsets(w)


def _exact_sums(kernel: DigitKernel, device: torch.device, w: torch.Tensor, generator: torch.Generator) -> bool:
    for rows in (1, 3, 65):
        x = torch.randint(-127, 128, (rows, w.shape[1]), dtype=torch.int8, generator=generator)
        expected = x.long() @ w.long().t()
        if not torch.equal(exact_product(kernel, x.to(device), w.to(device)).cpu().long(), expected):
            return False
    return True


def _exact_mod_p(kernel: DigitKernel, device: torch.device, w: torch.Tensor, generator: torch.Generator) -> bool:
    for digits, rows in ((4, 1), (2, 3), (4, 35), (2, 65)):
        if not kernel.at_once(digits * rows):
            continue  # such products are made of sums
        x = torch.randint(0, 256, (digits, rows, w.shape[1]), dtype=torch.uint8, generator=generator)
        numbers = torch.stack([(x[m].long() - 128) << 8 * m for m in range(digits)]).sum(dim=0)
        expected = (numbers @ w.long().t()) % P
        got = torch.empty(expected.shape, dtype=torch.int32, device=device)
        there = w.to(device)
        kernel.product_mod_p(x.to(device), there, kernel.offsets(there), got)
        if not torch.equal(got.cpu().long(), expected):
            return False
    return True
