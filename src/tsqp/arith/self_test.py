"""Which product of 8-bit digits is exact on this machine: decided by a test with random digits, once.

Digits that are all extreme would not do: saturating arithmetic passes them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import get_args

import torch
from numba.core.errors import NumbaError

from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.field import MAX_SMALL, Digits
from tsqp.arith.many_rows import ManyRowsKernel
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel, DigitKernel, OffsetKernel
from tsqp.arith.tensor_cores import DeviceFieldKernel, TensorCoreKernel
from tsqp.arith.triton_field import TritonKernel
from tsqp.errors import TsqpWarning


@cache
def pick_kernel(device: torch.device) -> DigitKernel:
    """The first fast kernel whose self-test passes on this machine, otherwise the blocked one.

    On CUDA that is Triton's where Triton is, compiles and is exact; where not, a TsqpWarning says why.
    """
    if device.type == "cuda" and (whole := _whole_products(device)) is not None:
        return whole
    return next((kernel for kernel in fast_kernels(device) if is_exact(kernel, device)), BlockedKernel())


def fast_kernels(device: torch.device) -> list[DigitKernel]:
    """What may be exact on this machine, the fastest first."""
    if device.type == "cuda":
        return [TensorCoreKernel()]
    return [kind() for kind in (ManyRowsKernel, FewRowsKernel) if kind.supported()] + [OffsetKernel()]


def is_exact(kernel: DigitKernel, device: torch.device) -> bool:
    """Whether products of random digits are those of int64 arithmetic, and mod p: for one row, few and many.

    Compiles the kernel's loops, so that no product waits for that.
    """
    try:
        return _passes(kernel, device)
    except (RuntimeError, NumbaError):  # not implemented on this device
        return False


def _passes(kernel: DigitKernel, device: torch.device) -> bool:
    """``is_exact``, with whatever a kernel raises that does not run here."""
    generator = torch.Generator().manual_seed(0)  # a fixed test: what it looks for fails on almost any digits
    w = torch.randint(-127, 128, (264, 1_160), dtype=torch.int8, generator=generator)
    whole = not isinstance(kernel, DeviceFieldKernel) or _exact_field(kernel, device, w, generator)
    return whole and _exact_sums(kernel, device, w, generator) and _exact_mod_p(kernel, device, w, generator)


def _whole_products(device: torch.device) -> DigitKernel | None:
    """Triton's kernel if it can be used on this device; a TsqpWarning and None if not."""
    try:
        kernel = TritonKernel()
        if _passes(kernel, device):
            return kernel
        reason = "its products are wrong here"
    except Exception as error:  # no triton, no C compiler for its launcher, an old GPU, too little shared memory, ...
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    warnings.warn(
        f"exact products on {device} take several passes, many times slower: Triton's kernel is not used ({reason})",
        TsqpWarning,
        stacklevel=3,
    )
    return None


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


def _exact_field(kernel: DeviceFieldKernel, device: torch.device, w: torch.Tensor, generator: torch.Generator) -> bool:
    """Of each tile size, with sizes that tiles divide and sizes that they do not: a variant is compiled for either."""
    aligned = torch.randint(-127, 128, (288, 1_280), dtype=torch.int8, generator=generator)
    for weights, rows in ((aligned, 1), (aligned, 17), (aligned, 33), (aligned, 65), (w, 3), (w, 67)):
        for digits in get_args(Digits):
            shape = (rows, weights.shape[1])
            least, end, dtype = (0, P, torch.int32) if digits == 4 else (-MAX_SMALL, MAX_SMALL + 1, torch.int16)
            x = torch.randint(least, end, shape, dtype=torch.int64, generator=generator)
            got = torch.empty(rows, len(weights), dtype=torch.int32, device=device)
            kernel.field_product(x.to(dtype).to(device), weights.to(device), digits, got)
            if not torch.equal(got.cpu().long(), (x @ weights.long().t()) % P):
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
