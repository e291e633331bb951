"""``awq``: 4-bit whole numbers, packed along the outputs in an order of their own, with scales and zeros of groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.checkpoint.stored_forms.base import DTYPES, QuantisedMatrix, StoredForm, groups_of_inputs, scaled
from tsqp.checkpoint.stored_forms.gptq import bits_and_groups, check_whole_words
from tsqp.checkpoint.stored_forms.packing import WORD, words_for
from tsqp.errors import UnsupportedModel

BITS = 4
PER_WORD = WORD // BITS
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output k of a word's eight is the nibble ORDER[k], counted from the lowest
SHIFTS = torch.tensor(ORDER, dtype=torch.int32) * BITS
_MASK = (1 << BITS) - 1
_MIDDLE = 1 << (BITS - 1)  # the zero where none are stored


class Awq(StoredForm):
    """``qweight`` (in, out/8), ``qzeros`` (groups, out/8), ``scales`` (groups, out), of the version gemm."""

    def __init__(self, group_size: int | None, zeros_stored: bool) -> None:
        self._group_size = group_size
        self._zeros_stored = zeros_stored

    @classmethod
    def of(cls, quantisation: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> Awq:
        """Raises UnsupportedModel for another version or number of bits, by name, and CorruptCheckpoint."""
        version = str(quantisation.get("version") or quantisation.get("format") or "gemm").lower()
        if quantisation.get("backend") == "llm-awq":
            version = "llm-awq"
        if version != "gemm":
            raise UnsupportedModel(f"{where}: awq's version {version!r} is not implemented; gemm is")
        _, group_size = bits_and_groups(quantisation, where, (BITS,))
        return cls(group_size, quantisation.get("zero_point") is not False)

    def matrix(self, files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        if f"{module}.qweight" not in files:
            return None
        outputs, inputs = shape
        size = self._group_size or inputs
        groups, words = -(-inputs // size), words_for(outputs, BITS)
        check_whole_words(files, module, shape, BITS)
        qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        files.expect(qweight, ("I32",), (inputs, words))
        files.expect(scales, tuple(DTYPES), (groups, outputs))
        has_zeros = self._zeros_stored or qzeros in files
        if has_zeros:
            files.expect(qzeros, ("I32",), (groups, words))

        def columns(name: str, first: int, end: int) -> torch.Tensor:
            """Columns ``first`` to ``end`` of the matrix that a tensor packs."""
            start, stop = first // PER_WORD, words_for(end, BITS)
            numbers = ((files.read(name)[:, start:stop, None] >> SHIFTS) & _MASK).flatten(1)
            return numbers[:, first - start * PER_WORD : end - start * PER_WORD]

        def dequantised(first: int, end: int) -> torch.Tensor:
            columns_scales = files.read(scales)[:, first:end]
            zeros = columns(qzeros, first, end) if has_zeros else torch.full(columns_scales.shape, _MIDDLE)
            group_of = groups_of_inputs(inputs, size)
            return scaled(columns(qweight, first, end), columns_scales, zeros, group_of, inputs_first=True)

        parts = (qweight, qzeros, scales) if has_zeros else (qweight, scales)
        recipe = f"awq {BITS}-bit, groups of {size}"
        return QuantisedMatrix(parts, shape, DTYPES[files.headers[scales].dtype], recipe, dequantised)
