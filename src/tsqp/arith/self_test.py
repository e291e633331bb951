"""Which product of 8-bit digits is exact on this machine: decided by a test with random digits, once.

Digits that are all extreme would not do: saturating arithmetic passes them.
"""

from __future__ import annotations

from functools import cache

import torch

from tsqp.arith.product import BlockedKernel, DigitKernel, OffsetKernel, exact_product


@cache
def pick_kernel(device: torch.device) -> DigitKernel:
    """The fast kernel where its self-test passes on this machine, otherwise the blocked one."""
    fast: DigitKernel = OffsetKernel()
    if device.type == "cuda":
        from tsqp.arith.tensor_cores import TensorCoreKernel

        fast = TensorCoreKernel()
    return fast if is_exact(fast, device) else BlockedKernel()


def is_exact(kernel: DigitKernel, device: torch.device) -> bool:
    """Whether products of random digits are those of int64 arithmetic, for one row and for many."""
    generator = torch.Generator().manual_seed(0)  # a fixed test: what it looks for fails on almost any digits
    w = torch.randint(-127, 128, (264, 1_160), dtype=torch.int8, generator=generator)
    for rows in (1, 65):
        x = torch.randint(-127, 128, (rows, w.shape[1]), dtype=torch.int8, generator=generator)
        expected = x.long() @ w.long().t()
        try:
            got = exact_product(kernel, x.to(device), w.to(device))
        except RuntimeError:  # not implemented on this device
            return False
        if not torch.equal(got.cpu().long(), expected):
            return False
    return True
