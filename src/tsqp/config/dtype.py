"""The number formats a run can be asked for, by the names that cross the wire."""

from __future__ import annotations

import math
from typing import Literal, get_args

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
ITEM_BYTES: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# What a worker computes its linear layers in: int8 has integer weights and activations, the rest is bfloat16; field is
# exact integers mod p, for the private modes.
ComputeDtype = Literal["float32", "bfloat16", "float16", "int8", "field"]
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)

# What a client asks of a worker: products in floats, in int8, or mod p. A worker prepares weights for no other.
NumericPath = Literal["float", "int8", "field"]

# What a model is computed in where nothing is masked or checked.
PlainDtype = Literal["float32", "bfloat16", "float16", "int8"]

# What a user asks for: auto is float32 for weights that are stored so, bfloat16 for all others.
AskedDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]

# What float payloads cross the line as: int8 is rows of 8-bit integers, each with one float32 scale.
WireDtype = Literal["float32", "bfloat16", "float16", "int8"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
SCALE_BYTES = 4


# What the private modes can keep keys and values as; elsewhere that is what the rest is computed in. int8 has one scale
# in float32 for each position and KV head, of keys and of values.
PrivateKVDtype = Literal["bfloat16", "float32", "int8"]
PRIVATE_KV_DTYPES: tuple[PrivateKVDtype, ...] = get_args(PrivateKVDtype)
KVDtype = Literal["float32", "bfloat16", "float16", "int8"]
# The heads that int8 is for: their rows are whole lanes of 32 bits, and sums of so many products stay below 2³¹.
INT8_HEAD_DIMS = range(4, 513, 4)


def payload_bytes(wire: WireDtype, shape: tuple[int, ...]) -> int:
    """The size of a float payload: it follows from the tensor's shape, so a receiver knows it before it looks."""
    elements = math.prod(shape)
    if wire == "int8":
        return elements + SCALE_BYTES * (elements // shape[-1] if elements else 0)
    return elements * ITEM_BYTES[wire]


def float_dtype(dtype: ComputeDtype) -> DtypeName:
    """What is computed in beside the linear layers: the dtype itself, bfloat16 beside int8, float32 beside field."""
    match dtype:
        case "int8":
            return "bfloat16"
        case "field":
            return "float32"
        case _:
            return dtype


def numeric_path(dtype: ComputeDtype) -> NumericPath:
    """The path that computes linear layers in ``dtype``."""
    return dtype if dtype in ("int8", "field") else "float"
