"""``gptq``: whole numbers of 2, 3, 4 or 8 bits, packed along the inputs, with scales and zeros of input groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.checkpoint.stored_forms.base import (
    DTYPES,
    QuantisedMatrix,
    StoredForm,
    groups_of_inputs,
    scaled,
    stored_groups,
)
from tsqp.checkpoint.stored_forms.packing import WORD, unpacked, unpacked_part, words_for
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

_FORMATS = ("gptq", "gptq_v2")


class Gptq(StoredForm):
    """``qweight`` (in·bits/32, out), ``qzeros`` (groups, out·bits/32), ``scales`` (groups, out), ``g_idx`` (in,).

    ``checkpoint_format`` gptq stores each zero less one, modulo 2^bits; gptq_v2 stores it as it is.
    """

    def __init__(self, bits: int, group_size: int | None, zero_offset: int, shuffled: bool) -> None:
        self._bits = bits
        self._group_size = group_size
        self._zero_offset = zero_offset
        self._shuffled = shuffled

    @classmethod
    def of(cls, quantisation: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> Gptq:
        """Raises UnsupportedModel for another layout or number of bits, by name, and CorruptCheckpoint."""
        named = quantisation.get("checkpoint_format") or quantisation.get("format") or "gptq"
        if quantisation.get("is_marlin_format"):
            named = "marlin"
        if named not in _FORMATS:
            raise UnsupportedModel(f"{where}: gptq's checkpoint_format {named!r} is not implemented")
        bits, group_size = bits_and_groups(quantisation, where, (2, 3, 4, 8))
        # Rules that leave modules out say no more than what is stored; others would change how modules are read.
        dynamic = quantisation.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(str(rule).startswith("-:") for rule in dynamic):
            raise UnsupportedModel(f"{where}: gptq's dynamic, bits and groups per module, is not implemented")
        shuffled = bool(quantisation.get("desc_act")) and group_size is not None
        return cls(bits, group_size, 1 if named == "gptq" else 0, shuffled)

    def matrix(self, files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        if f"{module}.qweight" not in files:
            return None
        outputs, inputs = shape
        bits, size = self._bits, self._group_size or inputs
        groups = -(-inputs // size)
        check_whole_words(files, module, shape, bits)
        qweight, qzeros, scales, listed = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        files.expect(qweight, ("I32",), (words_for(inputs, bits), outputs))
        files.expect(qzeros, ("I32",), (groups, words_for(outputs, bits)))
        files.expect(scales, tuple(DTYPES), (groups, outputs))
        if self._shuffled or listed in files:
            files.expect(listed, ("I32", "I64"), (inputs,))

        def dequantised(first: int, end: int) -> torch.Tensor:
            digits = unpacked(files.read(qweight)[:, first:end], bits, inputs, axis=0)
            zeros = unpacked_part(files.read(qzeros), bits, first, end)
            zeros = (zeros + self._zero_offset) & ((1 << bits) - 1)
            group_of = stored_groups(files, listed, groups) if listed in files else groups_of_inputs(inputs, size)
            return scaled(digits, files.read(scales)[:, first:end], zeros, group_of, inputs_first=True)

        parts = tuple(name for name in (qweight, qzeros, scales, listed) if name in files)
        recipe = f"gptq {bits}-bit, groups of {size}" + ("" if self._zero_offset else ", v2")
        return QuantisedMatrix(parts, shape, DTYPES[files.headers[scales].dtype], recipe, dequantised)

    def unused_tensors(self, files: SafetensorsFiles, matrices: Mapping[str, QuantisedMatrix]) -> set[str]:
        """Biases of zeros, which older tools wrote for every matrix that they quantised."""
        biases = {name.removesuffix("weight") + "bias" for name in matrices}
        return {name for name in biases if name in files and not bool(files.read(name).count_nonzero())}


def bits_and_groups(quantisation: Mapping[str, Any], where: str, known: tuple[int, ...]) -> tuple[int, int | None]:
    """``bits``, and ``group_size`` or None for one group. Raises UnsupportedModel, CorruptCheckpoint."""
    method, keys = quantisation.get("quant_method"), Keys(quantisation, where)
    bits = keys.size("bits", 4)
    if bits not in known:
        raise UnsupportedModel(f"{where}: {method} of {bits} bits is not implemented")
    return bits, None if quantisation.get("group_size") == -1 else keys.size("group_size", 128)


def check_whole_words(files: SafetensorsFiles, module: str, shape: tuple[int, int], bits: int) -> None:
    """Raises CorruptCheckpoint where a row or column does not fill whole words: the tools write no such matrices."""
    if any(size * bits % WORD for size in shape):
        raise CorruptCheckpoint(
            f"{files.place(f'{module}.qweight')}: {shape[0]}×{shape[1]} numbers of {bits} bits do not fill words"
        )
