"""A matrix that is stored in its own shape, in 8 bits, with scales beside it."""

from __future__ import annotations

import torch

from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.checkpoint.stored_forms.base import (
    DTYPES,
    QuantisedMatrix,
    RowReader,
    groups_of_inputs,
    scaled,
    stored_groups,
)

Block = tuple[int, int]  # how many rows and columns share a scale
FLOAT8 = ("F8_E4M3", "F8_E5M2")


def grid_of(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """How many scales a matrix has, down and across; the last blocks may be cut off."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def grid_shapes(shape: tuple[int, int], block: Block) -> tuple[tuple[int, ...], ...]:
    """The shapes that a stored grid of scales may have: one of a single column or number is also stored flat."""
    down, across = grid_of(shape, block)
    flat: tuple[tuple[int, ...], ...] = ((down,),) if across == 1 else ()
    return ((down, across), *flat, *(((),) if down == across == 1 else ()))


def grid_rows(files: SafetensorsFiles, name: str, shape: tuple[int, int], block: Block) -> RowReader:
    """Reads rows of a grid of scales or zeros, one for each row of the matrix."""
    grid, height = grid_of(shape, block), min(block[0], shape[0])

    def rows(first: int, end: int) -> torch.Tensor:
        stored = files.read(name).reshape(grid)
        return stored[torch.arange(first, end) // height]

    return rows


def scaled_matrix(
    files: SafetensorsFiles,
    module: str,
    shape: tuple[int, int],
    block: Block,
    recipe: str,
    *,
    scale: str = "weight_scale",
    dtype: torch.dtype | None = None,
    digit_dtypes: tuple[str, ...] = FLOAT8,
    scale_dtypes: tuple[str, ...] = tuple(DTYPES),
) -> QuantisedMatrix:
    """``module.weight`` times a scale for each block. ``dtype`` of the product is that of the scales, unless given.

    Beside the scales there may be ``weight_zero_point``, int8, of the same shape.
    Raises CorruptCheckpoint, UnsupportedModel.
    """
    weight, scales = f"{module}.weight", f"{module}.{scale}"
    zeros, listed = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    files.expect(weight, digit_dtypes, shape)
    files.expect(scales, scale_dtypes, *grid_shapes(shape, block))
    parts = [weight, scales]
    zero_rows = None
    if zeros in files:
        files.expect(zeros, ("I8", *FLOAT8), *grid_shapes(shape, block))
        zero_rows = grid_rows(files, zeros, shape, block)
        parts.append(zeros)
    if listed in files:
        files.expect(listed, ("I32", "I64"), (shape[1],))
        parts.append(listed)
    scale_rows = grid_rows(files, scales, shape, block)

    def dequantised(first: int, end: int) -> torch.Tensor:
        return scaled(
            files.read(weight)[first:end],
            scale_rows(first, end),
            None if zero_rows is None else zero_rows(first, end),
            input_groups(files, listed, shape, block),
        )

    return QuantisedMatrix(tuple(parts), shape, dtype or DTYPES[files.headers[scales].dtype], recipe, dequantised)


def input_groups(files: SafetensorsFiles, listed: str, shape: tuple[int, int], block: Block) -> torch.Tensor | None:
    """The group of each input: as ``listed``, where that tensor is and has no -1, else neighbours together.

    Raises CorruptCheckpoint.
    """
    if listed in files and not bool((files.read(listed) == -1).any()):
        return stored_groups(files, listed, grid_of(shape, block)[1])
    return groups_of_inputs(shape[1], block[1])
