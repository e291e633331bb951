"""Products of few rows, as fast as memory gives the weights: what a decode step asks for.

``torch._int_mm`` packs the weights before it multiplies, which pays for many rows only. Up to ``few`` rows of digits
the loops of ``vnni.py`` read the weights once, where they are. ``DigitKernel.product_mod_p`` says the same plainly.
"""

from __future__ import annotations

import torch

from tsqp.arith.product import OffsetKernel
from tsqp.arith.row_threads import RowWork, least_rows, row_threads
from tsqp.arith.vnni import VECTOR, X_ROWS, features, product_of_few, product_of_numbers, sums_of_few

# Up to so many rows of digits the loops are the faster; ``docs/performance.md`` has the measurement.
FEW = 64  # with vectors of 512 bits, where ``_int_mm`` has no more than the same instruction
FEW_OTHERWISE = 32  # beside AMX, or with vectors of 256 bits
LEAST_WEIGHTS = 1 << 21  # fewer, times ``X_ROWS`` rows of digits, are done by one thread: see ``least_columns``


class FewRowsKernel(OffsetKernel):
    """``OffsetKernel``, with loops of ``vpdpbusd`` for few rows. For processors that have it: ``supported``."""

    few = FEW if VECTOR == 64 and "amx-int8" not in features() else FEW_OTHERWISE

    def at_once(self, rows: int) -> bool:
        return rows <= self.few

    @staticmethod
    def supported() -> bool:
        return VECTOR > 0

    def accumulate_unsigned(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # it cannot look into compiled loops
            return super().accumulate_unsigned(x, w)
        if not 1 < len(x) <= self.few or not w.is_contiguous():  # ``_int_mm`` reads as fast for one row
            return super().accumulate_unsigned(x, w)
        out = torch.empty(len(x), len(w), dtype=torch.int32)
        arrays = (x.contiguous().numpy(), w.numpy(), out.numpy())
        row_threads().run(sums_of_few, len(w), *arrays, least=least_rows(w.shape[1]))
        return out

    def product_mod_p(self, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        if not (w.is_contiguous() and out.is_contiguous()):
            return super().product_mod_p(x, w, offsets, out)
        arrays = (x.flatten(0, 1).numpy(), w.numpy(), offsets.numpy(), out.view(torch.uint32).numpy())
        return row_threads().run(product_of_few, len(w), *arrays, least=least_columns(w, len(arrays[0])))

    def prepared(
        self, x: torch.Tensor, digits: int, w: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor
    ) -> RowWork | None:
        """Splits x, uint32 or int16 in tensors of int32 or int16 (T, K), and multiplies: in one loop, of memory that
        stays. None where ``product_mod_p`` would not do it in loops of few rows.
        """
        if digits * len(x) > self.few or not (x.is_contiguous() and w.is_contiguous() and out.is_contiguous()):
            return None
        values = x.view(torch.uint32 if digits == 4 else torch.int16).numpy()
        arrays = (values, digits, w.numpy(), offsets.numpy(), out.view(torch.uint32).numpy())
        return RowWork(product_of_numbers, len(w), arrays, least_columns(w, digits * len(x)))


def least_columns(w: torch.Tensor, rows: int) -> int:
    """Columns of weights (N, K), for so many rows of digits, from which on a second thread pays.

    Waking it takes as long as reading a megabyte, which a few rows wait for, or as multiplying it by ``X_ROWS`` rows.
    """
    return max(2, LEAST_WEIGHTS // (w.shape[1] * max(1, rows // X_ROWS)))
