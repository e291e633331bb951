"""Random matrices in each stored form, with what they stand for computed number by number from the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Stored = dict[str, torch.Tensor]  # the tensors of one module, by the rest of their names
Array = np.ndarray[Any, np.dtype[Any]]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is the output AWQ_ORDER[i] of its eight


@dataclass(frozen=True)
class Form:
    """``make(rng, out, in)`` gives stored tensors and the matrix; ``multiple``: what both sizes have to be."""

    quantisation: dict[str, Any]
    make: Callable[[np.random.Generator, int, int], tuple[Stored, torch.Tensor]]
    multiple: int = 1


def packed(rows: Array, bits: int) -> Array:
    """Each row of numbers as int32 words: one string of bits, lowest first, in Python's integers."""
    words = []
    for row in rows.tolist():
        string = sum(number << (bits * place) for place, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(string >> (32 * word)) & 0xFFFF_FFFF for word in range(count)])
    return np.array(words, dtype=np.uint32).reshape(len(rows), -1).view(np.int32)


def products(
    digits: Array, scales: torch.Tensor, scale_at: Callable[[int, int], tuple[int, int]], zeros: Array | None = None
) -> torch.Tensor:
    """(digit - zero) · scale, one after the other, as float32; ``scale_at`` says where the scale of a number is."""
    values = np.empty(digits.shape, dtype=np.float32)
    table = scales.float().numpy()
    for row in range(digits.shape[0]):
        for column in range(digits.shape[1]):
            at = scale_at(row, column)
            digit = np.float32(digits[row, column]) - (np.float32(0) if zeros is None else np.float32(zeros[at]))
            values[row, column] = digit * table[at]
    return torch.from_numpy(values)


def random_scales(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.001, 0.01, shape).astype(np.float32)).to(dtype)


def fp8(block: tuple[int, int] | None, dtype: torch.dtype, scale: str) -> Any:
    """Scales of blocks; of rows where ``block`` is (1, 0), of the matrix for None."""

    def make(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
        height, width = block or (outputs, inputs)
        width = width or inputs
        weight = torch.from_numpy(rng.normal(0, 20, (outputs, inputs)).astype(np.float32)).to(dtype)
        grid = random_scales(rng, -(-outputs // height), -(-inputs // width), dtype=torch.float32)
        value = products(weight.float().numpy(), grid, lambda row, column: (row // height, column // width))
        return {"weight": weight, scale: grid if block else grid.reshape(())}, value.bfloat16()

    return make


def ct_packed(bits: int, group: int, *, zeros: str = "", shuffled: bool = False) -> Any:
    """``zeros``: packed, plain or none."""

    def make(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
        groups, middle = inputs // group, 1 << (bits - 1)
        digits = rng.integers(0, 1 << bits, (outputs, inputs))
        scales = random_scales(rng, outputs, groups, dtype=torch.bfloat16)
        group_of = np.arange(inputs) // group
        stored = {
            "weight_packed": torch.from_numpy(packed(digits, bits)),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if shuffled:
            group_of = rng.permutation(group_of)
            stored["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        zero = rng.integers(0, 1 << bits, (outputs, groups)) if zeros else None
        if zero is not None and zeros == "packed":
            stored["weight_zero_point"] = torch.from_numpy(packed(zero.T, bits).T.copy())
        elif zero is not None:
            stored["weight_zero_point"] = torch.from_numpy((zero - middle).astype(np.int8))
        offset = None if zero is None else zero - middle
        value = products(digits - middle, scales, lambda row, column: (row, int(group_of[column])), offset)
        return stored, value.bfloat16()

    return make


def ct_int8(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
    digits = rng.integers(-128, 128, (outputs, inputs))
    scales = random_scales(rng, outputs, 1)
    zeros = rng.integers(-128, 128, (outputs, 1))
    value = products(digits, scales, lambda row, _: (row, 0), zeros)
    stored = {"weight": digits, "weight_zero_point": zeros}
    tensors = {name: torch.from_numpy(array.astype(np.int8)) for name, array in stored.items()}
    return {**tensors, "weight_scale": scales}, value.half()


def gptq(bits: int, group: int, *, shuffled: bool = False, v2: bool = False) -> Any:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
        groups = -(-inputs // group)
        digits = rng.integers(0, 1 << bits, (outputs, inputs))
        zeros = rng.integers(0, 1 << bits, (groups, outputs))
        scales = random_scales(rng, groups, outputs)
        group_of = np.arange(inputs) // group
        if shuffled:
            group_of = rng.permutation(group_of)
        stored_zeros = zeros if v2 else (zeros - 1) % (1 << bits)
        stored = {
            "qweight": torch.from_numpy(packed(digits.T.T, bits).T.copy()),
            "qzeros": torch.from_numpy(packed(stored_zeros, bits)),
            "scales": scales,
        }
        if shuffled:
            stored["g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        value = products(digits, scales, lambda row, column: (int(group_of[column]), row), zeros)
        return stored, value.half()

    return make


def awq(group: int, *, zeros: bool = True) -> Any:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
        digits = rng.integers(0, 16, (outputs, inputs))
        zero = rng.integers(0, 16, (inputs // group, outputs)) if zeros else np.full((inputs // group, outputs), 8)
        scales = random_scales(rng, inputs // group, outputs)

        def words(columns: Array) -> torch.Tensor:
            ordered = columns.reshape(len(columns), -1, 8)[:, :, list(AWQ_ORDER)]
            return torch.from_numpy(packed(ordered.reshape(len(columns), -1), 4))

        stored = {"qweight": words(digits.T), "scales": scales} | ({"qzeros": words(zero)} if zeros else {})
        return stored, products(digits, scales, lambda row, column: (column // group, row), zero).half()

    return make


def four_bit(block: int, *, nested: int = 0, dtype: str = "float16") -> Any:
    """``nested``: the block size of the scales' own scales."""

    def make(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
        codes = rng.integers(0, 16, outputs * inputs)
        blocks = -(-len(codes) // block)
        table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": [outputs, inputs]}
        padded = [*codes.tolist(), 0]
        pairs = [padded[i] << 4 | padded[i + 1] for i in range(0, len(codes), 2)]
        stored = {"weight": torch.tensor(pairs, dtype=torch.uint8)[:, None], "weight.quant_map": torch.tensor(table)}
        if nested:
            numbers = rng.integers(0, 256, blocks)
            inner, outer = np.sort(rng.uniform(-1, 1, 256)), rng.uniform(0.01, 0.02, -(-blocks // nested))
            inner, outer = inner.astype(np.float32), outer.astype(np.float32)
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.0625}
            absmax = [inner[n] * outer[i // nested] + np.float32(0.0625) for i, n in enumerate(numbers.tolist())]
            stored["weight.absmax"] = torch.from_numpy(numbers.astype(np.uint8))
            stored["weight.nested_absmax"] = torch.from_numpy(outer)
            stored["weight.nested_quant_map"] = torch.from_numpy(inner)
        else:
            absmax = list(rng.uniform(0.01, 0.02, blocks).astype(np.float32))
            stored["weight.absmax"] = torch.tensor(np.array(absmax))
        text = json.dumps(state).encode()
        stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        values = [table[code] * absmax[i // block] for i, code in enumerate(codes.tolist())]
        return stored, torch.tensor(np.array(values)).view(outputs, inputs).to(getattr(torch, dtype))

    return make


def llm_int8(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Stored, torch.Tensor]:
    digits = rng.integers(-127, 128, (outputs, inputs))
    largest = rng.uniform(0.1, 1, outputs).astype(np.float32)
    value = products(digits, torch.from_numpy(largest)[:, None], lambda row, _: (row, 0)) * float(np.float32(1 / 127))
    stored = {"weight": torch.from_numpy(digits.astype(np.int8)), "SCB": torch.from_numpy(largest)}
    return stored | {"weight_format": torch.tensor(0, dtype=torch.uint8)}, value


def ct_config(form: str, weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **others}


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [24, 20]}
FP8_PLAIN = {"quant_method": "fp8", "activation_scheme": "static"}
GPTQ = {"quant_method": "gptq", "sym": False, "group_size": 16}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}
NO_BLOCKS = {"weight_block_size": None}
FORMS = {
    "fp8-blocks": Form(FP8_BLOCKS, fp8((24, 20), E4M3, "weight_scale_inv")),
    "fp8-e5m2-matrix": Form(FP8_PLAIN, fp8(None, E5M2, "weight_scale")),
    "fp8-matrix-called-inverse": Form(FP8_PLAIN | NO_BLOCKS, fp8(None, E4M3, "weight_scale_inv")),
    "fbgemm": Form({"quant_method": "fbgemm_fp8"}, fp8((1, 0), E4M3, "weight_scale")),
    "ct-int2-packed-zeros": Form(ct_config("pack-quantized", INT4 | {"num_bits": 2}), ct_packed(2, 16, zeros="packed")),
    "ct-int4": Form(ct_config("pack-quantized", INT4), ct_packed(4, 16)),
    "ct-int4-plain-zeros": Form(ct_config("pack-quantized", INT4), ct_packed(4, 16, zeros="plain")),
    "ct-int4-shuffled": Form(ct_config("pack-quantized", INT4), ct_packed(4, 16, zeros="packed", shuffled=True), 16),
    "ct-int8-zeros": Form(ct_config("int-quantized", {"num_bits": 8, "strategy": "channel"}), ct_int8),
    "gptq-3-bit": Form(GPTQ | {"bits": 3}, gptq(3, 16), 32),
    "gptq-shuffled": Form(GPTQ | {"bits": 4, "desc_act": True}, gptq(4, 16, shuffled=True), 32),
    "gptq-8-bit": Form(GPTQ | {"bits": 8}, gptq(8, 16), 32),
    "gptq-2-bit-v2": Form(GPTQ | {"bits": 2, "checkpoint_format": "gptq_v2"}, gptq(2, 16, v2=True), 32),
    "awq": Form(AWQ, awq(16), 32),
    "awq-without-zeros": Form(AWQ | {"zero_point": False}, awq(16, zeros=False), 32),
    "nf4": Form(BNB, four_bit(64)),
    "nf4-nested-odd": Form(BNB, four_bit(64, nested=4, dtype="bfloat16")),
    "int8": Form({"load_in_8bit": True}, llm_int8),
}
