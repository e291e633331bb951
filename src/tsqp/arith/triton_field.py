"""The field product as one Triton launch for few rows, two for many: no sums of single digits are ever in memory.

Few rows are bound by reading the weights: the digits are taken in registers, an accumulator each, and the inner size is
split over programs where the columns alone do not fill the device. Many rows are bound by multiplying: one pass writes
the digits as int8, as many bytes as x has, and a tile of one accumulator goes over them digit by digit, or over all of
them at once.

Loads without triton; making a ``TritonKernel`` needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from tsqp.arith.field import Digits
from tsqp.arith.tensor_cores import DeviceFieldKernel

LEAST_PART = 512  # of the inner size: a shorter part is not worth what adding it costs
AT_ONCE = 1024  # numbers that one program splits or adds


@dataclass(frozen=True)
class Tiles:
    """What one program computes: rows × columns, ``inner`` terms at a time; ``warps`` and pipeline ``stages``."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    split: bool  # whether the digits are written first, with one pass for each
    at_once: bool = False  # of digits that are written first: one pass for all, side by side in one accumulator


# By the most rows. Those for 16 are what a laboratory kernel was fastest with on an H200 (docs/log.md); the others are
# estimates from registers and shared memory, until benchmarks/gpu_field.py has compared CANDIDATES on a device.
TABLE = (
    (16, Tiles(16, 64, 128, warps=4, stages=4, split=False)),
    (32, Tiles(32, 64, 128, warps=4, stages=3, split=False)),
    (64, Tiles(64, 64, 64, warps=4, stages=3, split=False)),
)
MANY = Tiles(128, 128, 128, warps=8, stages=3, split=True)

CANDIDATES = (
    Tiles(16, 32, 256, warps=4, stages=3, split=False),
    Tiles(16, 128, 128, warps=4, stages=3, split=False),
    Tiles(64, 128, 64, warps=8, stages=3, split=False),
    Tiles(64, 128, 128, warps=4, stages=4, split=True),
    Tiles(64, 256, 128, warps=8, stages=3, split=True),
    Tiles(128, 128, 64, warps=8, stages=4, split=True),
    Tiles(128, 128, 128, warps=8, stages=4, split=True),
    Tiles(128, 64, 128, warps=4, stages=4, split=True),
    Tiles(64, 128, 128, warps=8, stages=3, split=True, at_once=True),
)


def tiles_for(rows: int) -> Tiles:
    """The tiles of a product of so many rows."""
    return next((tiles for most, tiles in TABLE if rows <= most), MANY)


class TritonKernel(DeviceFieldKernel):
    """Field products by ``triton_loops``; products of digits alone by ``_int_mm``.

    ``loops`` are other kernels of the same names, such as interpreted ones; ``tiles`` are used whatever the rows.
    """

    def __init__(self, loops: ModuleType | None = None, tiles: Tiles | None = None, processors: int = 0) -> None:
        """Raises ImportError without triton. ``processors`` are those of the device that is there, when 0."""
        if loops is None:
            from tsqp.arith import triton_loops as loops
        self._loops: Any = loops
        self._tiles = tiles
        self._processors = processors

    def field_product(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor) -> None:
        if x.stride(1) != 1 or out.stride(1) != 1 or not w.is_contiguous():
            raise ValueError("rows of x and out, and all of w, must lie closely")
        if not len(x) or not len(w):
            return
        tiles = self._tiles or tiles_for(len(x))
        with torch.cuda.device_of(x):  # triton launches on the current device
            (self._many_rows if tiles.split else self._few_rows)(x, w, digits, out, tiles)

    def _few_rows(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor, tiles: Tiles) -> None:
        rows, inner, columns = *x.shape, len(w)
        grid = (_over(rows, tiles.rows), _over(columns, tiles.columns))
        part = self._part(inner, grid[0] * grid[1], tiles.inner, x)
        parts = _over(inner, part)
        y = out if parts == 1 else torch.empty(parts, rows, columns, dtype=torch.int32, device=x.device)
        self._loops.few_rows[(*grid, parts)](
            *(x, w, y, rows, columns, inner, part, x.stride(0), y.stride(-2), rows * columns),
            **_options(tiles, digits),
        )
        if parts > 1:
            programs = (_over(rows * columns, AT_ONCE),)
            self._loops.add_parts[programs](y, out, parts, rows, columns, out.stride(0), SIZE=AT_ONCE)

    def _many_rows(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor, tiles: Tiles) -> None:
        rows, inner, columns = *x.shape, len(w)
        planes = torch.empty(digits, rows, inner, dtype=torch.int8, device=x.device)
        programs = (_over(rows * inner, AT_ONCE),)
        self._loops.split[programs](x, planes, rows, inner, x.stride(0), DIGITS=digits, SIZE=AT_ONCE)
        grid = (_over(rows, tiles.rows), _over(columns, tiles.columns))
        product = self._loops.digits_at_once if tiles.at_once else self._loops.many_rows
        product[grid](planes, w, out, rows, columns, inner, out.stride(0), **_options(tiles, digits))

    def _part(self, inner: int, programs: int, step: int, x: torch.Tensor) -> int:
        """How much of the inner size one program has: two programs for each processor, where that can be."""
        processors = self._processors or torch.cuda.get_device_properties(x.device).multi_processor_count
        parts = max(1, min(2 * processors // programs, inner // LEAST_PART))
        return _over(_over(inner, parts), step) * step


def _options(tiles: Tiles, digits: Digits) -> dict[str, int]:
    return {
        "DIGITS": digits,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _over(size: int, part: int) -> int:
    """How many parts cover a size."""
    return -(-size // part)
