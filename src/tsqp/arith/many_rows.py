"""Products of many rows on processors with AMX: what a prefill asks for.

``torch._int_mm`` uses AMX too, at a third of its rate, and leaves sums in memory that another pass makes numbers of.
The loops of ``amx.py`` keep both in the cache. ``DigitKernel.product_mod_p`` says the same plainly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsqp.arith import amx
from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.row_threads import row_threads

BLOCK_BYTES = 1 << 19  # of packed weights: they and the digits that pass over them fit the second cache
LEAST_BLOCK = 128  # columns, where rows of weights are long
LEAST_WORK = 1 << 26  # terms from which on a second thread pays


class ManyRowsKernel(FewRowsKernel):
    """``FewRowsKernel``, with tiles of AMX for more rows than it takes."""

    def at_once(self, rows: int) -> bool:
        return True

    @staticmethod
    def supported() -> bool:
        return FewRowsKernel.supported() and amx.permitted()

    def accumulate_unsigned(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or len(x) <= self.few or not w.is_contiguous():
            return super().accumulate_unsigned(x, w)
        out = torch.empty(len(x), len(w), dtype=torch.int32)
        columns = _columns(len(x), w)
        digits = _whole_tiles(x.contiguous()).numpy()
        row_threads().run(amx.sums_of_many, _blocks(w, columns), digits, _words(w), columns, out.numpy(), least=2)
        return out

    def product_mod_p(self, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        digits, rows, _ = x.shape
        if digits * rows <= self.few or digits not in (2, 4) or not (w.is_contiguous() and out.is_contiguous()):
            return super().product_mod_p(x, w, offsets, out)
        whole = rows >= amx.ROWS
        place = out if whole else out.new_empty(amx.ROWS, len(w))
        columns = _columns(digits * rows, w)
        arrays = (_whole_tiles(x).numpy(), _words(w), offsets.numpy(), columns, place.view(torch.uint32).numpy())
        row_threads().run(amx.product_of_many, _blocks(w, columns), *arrays, least=2)
        if not whole:
            out.copy_(place[:rows])
        return None


def _whole_tiles(x: torch.Tensor) -> torch.Tensor:
    """x uint8 (…, rows, K) with at least a tile of rows, and K in whole tiles: itself, where it is so already."""
    rows, inner = x.shape[-2:]
    beyond = (0, -inner % amx.TERMS, 0, max(0, amx.ROWS - rows))
    return F.pad(x, beyond) if any(beyond) else x


def _words(w: torch.Tensor) -> amx.Words:
    """Weights int8 (N, K) as words of four terms, int32 (N, K / 4): without a copy for every K of a model."""
    beyond = -w.shape[1] % amx.TERMS_OF_A_WORD
    words: amx.Words = (F.pad(w, (0, beyond)) if beyond else w).view(torch.int32).numpy()
    return words


def _columns(rows: int, w: torch.Tensor) -> int:
    """Columns of one block of work, so that every thread has about as many blocks as the others."""
    columns, inner = w.shape
    threads = row_threads().threads if rows * columns * inner >= LEAST_WORK else 1
    fit = max(LEAST_BLOCK, BLOCK_BYTES // inner)
    blocks = -(-columns // fit)
    blocks = -(-blocks // threads) * threads
    return -(-columns // (blocks * amx.COLUMNS)) * amx.COLUMNS


def _blocks(w: torch.Tensor, columns: int) -> int:
    return -(-len(w) // columns)
