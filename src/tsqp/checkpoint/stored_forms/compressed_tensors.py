"""``compressed-tensors``: whole numbers or 8-bit floats, packed or not, by schemes that name their modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.checkpoint.shapes import EMBEDDING
from tsqp.checkpoint.stored_forms.base import DTYPES, QuantisedMatrix, RowReader, StoredForm, scaled
from tsqp.checkpoint.stored_forms.name_patterns import check_pattern
from tsqp.checkpoint.stored_forms.packing import unpacked, unpacked_part, words_for
from tsqp.checkpoint.stored_forms.weight_scales import (
    FLOAT8,
    Block,
    grid_of,
    grid_rows,
    grid_shapes,
    input_groups,
    scaled_matrix,
)
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"  # the schemes name their formats
_REGEX = "re:"


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantised. ``block``: rows and columns that share a scale, -1 for all.

    ``needs``: parts without which the others would be read as another matrix.
    """

    targets: tuple[str, ...]
    format: str
    bits: int
    is_float: bool
    block: tuple[int, int]
    needs: tuple[str, ...]

    def block_of(self, shape: tuple[int, int]) -> Block:
        height, width = self.block
        return shape[0] if height == -1 else height, shape[1] if width == -1 else width


class CompressedTensors(StoredForm):
    """A module's scheme is that of its name, else of a pattern, else of its class, as the library orders them."""

    unused = (
        ".input_scale",
        ".input_zero_point",
        ".output_scale",
        ".output_zero_point",
        ".k_scale",
        ".v_scale",
        ".q_scale",
        ".k_zero_point",
        ".v_zero_point",
        ".q_zero_point",
    )

    def __init__(self, schemes: tuple[Scheme, ...], ignore: tuple[str, ...], notes: tuple[str, ...]) -> None:
        self._ignore = ignore
        self.notes = notes
        self.has_matrices = bool(schemes)  # or activations alone are quantised
        by_target = {target: scheme for scheme in schemes for target in scheme.targets}
        names = sorted(by_target, key=lambda target: (target.startswith(_REGEX), target))
        self._schemes = [(target, by_target[target]) for target in names]

    @classmethod
    def of(cls, quantisation: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> CompressedTensors:
        """Raises UnsupportedModel for a format or scheme that is not read, by name, and CorruptCheckpoint."""
        for key in ("sparsity_config", "transform_config"):
            given = quantisation.get(key)
            if given and not (isinstance(given, dict) and given.get("format") == "dense"):
                raise UnsupportedModel(f"{where}: compressed-tensors' {key} is not implemented")
        groups = quantisation.get("config_groups")
        if not isinstance(groups, dict):
            raise CorruptCheckpoint(f"{where}: compressed-tensors without config_groups")
        schemes, notes = [], set()
        for name, group in groups.items():
            if not isinstance(group, dict):
                raise UnsupportedModel(f"{where}: config_groups.{name} names a preset, which is not implemented")
            if group.get("weights") is not None:
                schemes.append(_scheme(group, quantisation.get("format"), f"{where}: config_groups.{name}"))
            if group.get("input_activations") or group.get("output_activations"):
                notes.add("its quantisation of activations")
        if quantisation.get("kv_cache_scheme"):
            notes.add("its quantisation of the KV cache")
        ignore = _texts(quantisation.get("ignore") or [], f"{where}: ignore")
        return cls(tuple(schemes), ignore, tuple(sorted(notes)))

    def matrix(self, files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        packed = f"{module}.weight_packed" in files
        weight = files.headers.get(f"{module}.weight")
        if not packed and (weight is None or weight.dtype not in ("I8", *FLOAT8)):
            return None
        place = files.place(f"{module}.weight_packed" if packed else f"{module}.weight")
        scheme = self._scheme_of(module)
        if scheme is None:
            raise CorruptCheckpoint(f"{place} is quantised, but quantization_config has no scheme for it")
        if packed != (scheme.format == _PACKED):
            raise CorruptCheckpoint(f"{place} is not stored as quantization_config says, {scheme.format}")
        missing = [part for part in scheme.needs if f"{module}.{part}" not in files]
        if missing:
            raise CorruptCheckpoint(f"{place} has no {module}.{missing[0]} beside it")
        block = scheme.block_of(shape)
        recipe = f"compressed-tensors {scheme.format} {scheme.bits}-bit, scales of {_described(scheme.block)}"
        if packed:
            return packed_matrix(files, module, shape, scheme.bits, block, recipe)
        dtypes = FLOAT8 if scheme.is_float else ("I8",)
        return scaled_matrix(files, module, shape, block, recipe, digit_dtypes=dtypes)

    def _scheme_of(self, module: str) -> Scheme | None:
        kind = "Embedding" if f"{module}.weight" == EMBEDDING else "Linear"
        if any(_names(target, module, kind) for target in self._ignore):
            return None
        by_name = (scheme for target, scheme in self._schemes if _names(target, module))
        by_class = (scheme for target, scheme in self._schemes if target == kind)
        return next(by_name, None) or next(by_class, None)


def packed_matrix(
    files: SafetensorsFiles, module: str, shape: tuple[int, int], bits: int, block: Block, recipe: str
) -> QuantisedMatrix:
    """``weight_packed`` (out, in·bits/32): numbers from -2^(bits-1), stored from 0; ``weight_scale`` beside it.

    Zeros, where there are some, are packed in the same way along the outputs, or int8 as they are.
    Raises CorruptCheckpoint, UnsupportedModel.
    """
    packed, scales, zeros, size, listed = (
        f"{module}.weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx")
    )
    outputs, inputs = shape
    grid = grid_of(shape, block)
    files.expect(packed, ("I32",), (outputs, words_for(inputs, bits)))
    files.expect(scales, tuple(DTYPES), *grid_shapes(shape, block))
    files.expect(size, ("I64", "I32"), (2,))
    if files.read(size).tolist() != list(shape):
        raise CorruptCheckpoint(f"{files.place(size)} is {files.read(size).tolist()}, not {list(shape)}")
    zero_rows: RowReader | None = None
    if zeros in files and files.headers[zeros].dtype == "I32":
        files.expect(zeros, ("I32",), (words_for(outputs, bits), grid[1]))
        zero_rows = _packed_zeros(files, zeros, bits)
    elif zeros in files:
        files.expect(zeros, ("I8",), *grid_shapes(shape, block))
        zero_rows = grid_rows(files, zeros, shape, block)
    if listed in files:
        files.expect(listed, ("I32", "I64"), (inputs,))
    scale_rows, middle = grid_rows(files, scales, shape, block), 1 << (bits - 1)

    def dequantised(first: int, end: int) -> torch.Tensor:
        return scaled(
            unpacked(files.read(packed)[first:end], bits, inputs) - middle,
            scale_rows(first, end),
            None if zero_rows is None else zero_rows(first, end),
            input_groups(files, listed, shape, block),
        )

    parts = tuple(name for name in (packed, scales, size, zeros, listed) if name in files)
    return QuantisedMatrix(parts, shape, DTYPES[files.headers[scales].dtype], recipe, dequantised)


def _packed_zeros(files: SafetensorsFiles, name: str, bits: int) -> RowReader:
    """Zeros (out, groups) that are packed along the outputs."""

    def rows(first: int, end: int) -> torch.Tensor:
        return unpacked_part(files.read(name).t(), bits, first, end).t() - (1 << (bits - 1))

    return rows


def _scheme(group: Mapping[str, Any], form: Any, where: str) -> Scheme:
    """One of ``config_groups``. Raises UnsupportedModel, CorruptCheckpoint."""
    weights = group["weights"]
    if not isinstance(weights, dict):
        raise CorruptCheckpoint(f"{where}.weights must be an object")
    named = group.get("format") or form
    if named not in _FORMATS:
        missing = "a scheme without a format" if named == _MIXED else f"compressed-tensors' format {named!r}"
        raise UnsupportedModel(f"{where}: {missing} is not implemented")
    bits, kind = Keys(weights, f"{where}.weights").size("num_bits", 8), weights.get("type", "int")
    known: tuple[int, ...] = (8,) if kind in ("int", "float") else ()  # it may be anything
    if named == _PACKED:
        known = (2, 4, 8) if kind == "int" else ()
    if bits not in known:
        raise UnsupportedModel(f"{where}: {named} weights of type {kind!r} and {bits} bits are not implemented")
    targets = _texts(group.get("targets") or [], f"{where}.targets")
    needs: tuple[str, ...] = ("weight_zero_point",) if weights.get("symmetric") is False else ()
    if weights.get("actorder") in ("group", "dynamic", True):
        needs += ("weight_g_idx",)
    return Scheme(targets, named, bits, kind == "float", _block(weights, f"{where}.weights"), needs)


def _block(weights: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The rows and columns that share a scale, from ``strategy``; -1 for all of them."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "tensor":
        return -1, -1
    if strategy == "channel":
        return 1, -1
    if strategy == "group":
        return 1, Keys(weights, where).size("group_size")
    if strategy != "block":
        raise UnsupportedModel(f"{where}: the strategy {strategy!r} is not implemented")
    given = weights.get("block_structure")
    sizes = [int(part) for part in re.findall(r"\d{1,9}", given)] if isinstance(given, str) else given
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(part) is int and part > 0 for part in sizes)):
        raise CorruptCheckpoint(f"{where}: block_structure must be two positive integers, not {given!r}")
    return sizes[0], sizes[1]


def _described(block: tuple[int, int]) -> str:
    height, width = block
    if width == -1:
        return "matrices" if height == -1 else "rows"
    return f"groups of {width}" if height == 1 else f"blocks of {height}×{width}"


def _texts(values: Any, where: str) -> tuple[str, ...]:
    """A list of names and patterns. Raises CorruptCheckpoint for another, and as ``check_pattern``."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CorruptCheckpoint(f"{where} must be a list of names")
    for value in values:
        if value.startswith(_REGEX):
            check_pattern(value.removeprefix(_REGEX), where)
    return tuple(values)


def _names(target: str, module: str, kind: str | None = None) -> bool:
    if target.startswith(_REGEX):
        return re.match(target.removeprefix(_REGEX), module) is not None
    return target in (module, kind)
