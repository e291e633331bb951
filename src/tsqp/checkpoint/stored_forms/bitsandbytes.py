"""``bitsandbytes``: 4-bit codes of a table of 16 values (NF4, FP4), and 8-bit whole numbers (LLM.int8)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.checkpoint.stored_forms.base import QuantisedMatrix, StoredForm
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

_STATE = "weight.quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # bytes are stored in any of these
_INT8_STEP = 7.874015718698502e-3  # 1/127, as the library spells it
_ROW_MAJOR = 0
_MAX_STATE_BYTES = 1 << 16
_MAX_BLOCK = 1 << 16  # the library's are at most 4096


class BitsAndBytes(StoredForm):
    """What is stored says all: the configuration is for quantising when a model is loaded."""

    unused = (".weight_format",)

    @classmethod
    def of(cls, quantisation: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> BitsAndBytes:
        return cls()

    def matrix(self, files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        if f"{module}.weight" not in files:
            return None
        states = [kind for kind in _TYPES if f"{module}.{_STATE}{kind}" in files]
        if states:
            return four_bit_matrix(files, module, shape, states[0])
        if f"{module}.weight.absmax" in files:
            raise CorruptCheckpoint(f"{files.place(f'{module}.weight')} is quantised, but has no {_STATE}nf4 or fp4")
        return int8_matrix(files, module, shape) if f"{module}.SCB" in files else None

    def unused_tensors(self, files: SafetensorsFiles, matrices: Mapping[str, QuantisedMatrix]) -> set[str]:
        """The layouts of LLM.int8's kernels. Raises UnsupportedModel for weights in another than rows."""
        formats = super().unused_tensors(files, matrices)
        for name in sorted(formats):
            if any(int(value) != _ROW_MAJOR for value in files.read(name).flatten()[:1]):
                raise UnsupportedModel(f"{files.place(name)}: weights in the layout of a GPU are not implemented")
        return formats


@dataclass(frozen=True)
class BlockState:
    """What a ``quant_state`` says: ``nested`` is the block size of the scales' own scales, and what is added."""

    block: int
    dtype: torch.dtype
    nested: tuple[int, float] | None


def four_bit_matrix(files: SafetensorsFiles, module: str, shape: tuple[int, int], kind: str) -> QuantisedMatrix:
    """Codes in the order of the matrix, two of a byte, the high one first; blocks of them share a scale, ``absmax``.

    With double quantisation a scale is nested_quant_map[absmax] · nested_absmax + offset. All in float32, and the
    product is rounded to the dtype that the state names. Raises CorruptCheckpoint, UnsupportedModel.
    """
    weight, state_name = f"{module}.weight", f"{module}.{_STATE}{kind}"
    absmax, table = f"{weight}.absmax", f"{weight}.quant_map"
    inner_scales, inner_table = f"{weight}.nested_absmax", f"{weight}.nested_quant_map"
    state = read_state(files, state_name, shape)
    count, inputs = shape[0] * shape[1], shape[1]
    blocks = -(-count // state.block)
    size = -(-count // 2) // _STORAGE.get(files.headers[weight].dtype, 1)
    files.expect(weight, tuple(_STORAGE), (size, 1), (1, size), (size,))
    files.expect(table, ("F32",), (16,))
    files.expect(absmax, ("U8",) if state.nested else ("F32",), (blocks,))
    parts = [weight, absmax, table, state_name]
    if state.nested:
        files.expect(inner_table, ("F32",), (256,))
        files.expect(inner_scales, ("F32",), (-(-blocks // state.nested[0]),))
        parts += [inner_scales, inner_table]

    def dequantised(first: int, end: int) -> torch.Tensor:
        start, stop = first * inputs, end * inputs
        packed = files.read(weight).flatten().view(torch.uint8)[start // 2 : -(-stop // 2)]
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[start % 2 :][: stop - start]
        block_of = torch.arange(start, stop) // state.block
        low, high = start // state.block, (stop - 1) // state.block + 1
        scales = files.read(absmax)[low:high]
        if state.nested:
            inner, offset = state.nested
            outer = files.read(inner_scales)[torch.arange(low, high) // inner]
            scales = files.read(inner_table)[scales.int()] * outer + offset
        return (files.read(table)[codes.int()] * scales[block_of - low]).view(end - first, inputs)

    recipe = f"bitsandbytes {kind}, blocks of {state.block}" + (", nested" if state.nested else "")
    return QuantisedMatrix(tuple(parts), shape, state.dtype, recipe, dequantised)


def read_state(files: SafetensorsFiles, name: str, shape: tuple[int, int]) -> BlockState:
    """The JSON in the bytes of a tensor, held against the matrix. Raises CorruptCheckpoint, UnsupportedModel."""
    place = files.place(name)
    header = files.headers[name]
    if header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > _MAX_STATE_BYTES:
        raise CorruptCheckpoint(f"{place} does not hold the bytes of a JSON object")
    try:
        state = json.loads(files.read(name).numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{place} is not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"{place} holds a JSON {type(state).__name__}, not an object")
    if state.get("shape") != list(shape):
        raise CorruptCheckpoint(f"{place} has shape {state.get('shape')!r}, its configuration asks for {shape}")
    dtype = state.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedModel(f"{place} has dtype {dtype!r}; supported are {', '.join(_DTYPES)}")
    keys = Keys(state, place)
    block, inner, nested = keys.size("blocksize"), keys.size("nested_blocksize", 1), None
    if max(block, inner) > _MAX_BLOCK:
        raise UnsupportedModel(f"{place}: blocks of {max(block, inner)} are not implemented")
    if "nested_blocksize" in state or "nested_offset" in state:
        offset = state.get("nested_offset")
        if type(offset) is not float or not math.isfinite(offset):
            raise CorruptCheckpoint(f"{place}: nested_offset must be a number, not {offset!r}")
        nested = inner, offset
    return BlockState(block, _DTYPES[dtype], nested)


def int8_matrix(files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix:
    """Digits times their row's largest, ``SCB``, times 1/127, in float32. Raises CorruptCheckpoint."""
    weight, largest = f"{module}.weight", f"{module}.SCB"
    files.expect(weight, ("I8",), shape)
    files.expect(largest, ("F32",), (shape[0],))

    def dequantised(first: int, end: int) -> torch.Tensor:
        return files.read(weight)[first:end] * files.read(largest)[first:end, None] * _INT8_STEP

    return QuantisedMatrix((weight, largest), shape, torch.float32, "bitsandbytes int8", dequantised)
