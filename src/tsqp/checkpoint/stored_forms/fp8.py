"""``fp8`` and ``fbgemm_fp8``: 8-bit floats with a scale for each block, row or matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.checkpoint.stored_forms.base import QuantisedMatrix, StoredForm
from tsqp.checkpoint.stored_forms.weight_scales import FLOAT8, Block, scaled_matrix
from tsqp.errors import CorruptCheckpoint

_MODEL_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEFAULT_BLOCK = [128, 128]


class Fp8(StoredForm):
    """``weight_scale_inv`` for blocks of ``weight_block_size`` or the matrix, or ``weight_scale`` for matrix or rows.

    The name says inverse; the scale multiplies.
    """

    unused = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale", ".kv_scale")
    notes = ("its quantisation of activations",)

    def __init__(self, block: Block | None, dtype: torch.dtype) -> None:
        self._block = block
        self._dtype = dtype

    @classmethod
    def of(cls, quantisation: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> Fp8:
        """Raises CorruptCheckpoint for a block size that is none."""
        block = quantisation.get("weight_block_size", _DEFAULT_BLOCK)
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        ):
            raise CorruptCheckpoint(f"{where}: weight_block_size must be two positive integers, not {block!r}")
        return cls(None if block is None else (block[0], block[1]), model_dtype(settings))

    def matrix(self, files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        weight = files.headers.get(f"{module}.weight")
        if weight is None or weight.dtype not in FLOAT8:
            return None
        name = weight.dtype.removeprefix("F8_").lower()
        if f"{module}.weight_scale_inv" in files and self._block is not None:
            block, recipe, scale = self._block, f"blocks of {self._block[0]}×{self._block[1]}", "weight_scale_inv"
        else:
            scale = "weight_scale_inv" if f"{module}.weight_scale_inv" in files else "weight_scale"
            stored = files.headers.get(f"{module}.{scale}")
            by_row = stored is not None and len(stored.shape) > 0 and stored.shape[0] != 1
            block = (1, shape[1]) if by_row else shape
            recipe = "rows" if by_row else "matrices"
        return scaled_matrix(
            files, module, shape, block, f"fp8 {name}, scales of {recipe}", scale=scale, dtype=self._dtype
        )


def model_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a ``config.json`` gives its model; bfloat16 where it gives none."""
    named = settings.get("dtype", settings.get("torch_dtype"))
    return _MODEL_DTYPES.get(named, torch.bfloat16) if isinstance(named, str) else torch.bfloat16
