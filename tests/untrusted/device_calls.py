"""Calls of every path, what is sent in them, and what a worker without a device answers."""

from __future__ import annotations

import torch

from tests.arith.kernels import CPU
from tests.untrusted.calls import CHECKPOINT, CONFIG
from tsqp.arith.modulus import P
from tsqp.config.dtype import NumericPath
from tsqp.config.groups import linear_groups
from tsqp.untrusted.paths.field import FieldOperators, FieldWorkerWeights
from tsqp.untrusted.paths.plain import Operators
from tsqp.untrusted.store import WeightStore
from tsqp.wire.messages import Call, Embed, Linear, MultiplyPads, Product
from tsqp.wire.payload import tensor_bytes, wire_format

QKV = linear_groups(CONFIG)["qkv"]
HIDDEN = CONFIG.hidden_size
STORE = WeightStore(CHECKPOINT, "float32", CPU)


def on_the_cpu(path: NumericPath, call: Call, payload: bytes) -> bytes:
    """What a worker without a device answers."""
    weights = STORE.prepare(path)
    wire = wire_format("bfloat16" if path == "int8" else "float32")
    operators = FieldOperators(weights) if isinstance(weights, FieldWorkerWeights) else Operators(weights, wire)
    found = operators(call, [memoryview(bytearray(payload))])
    assert isinstance(found, memoryview)
    return bytes(found)


def payload_of(call: Call, seed: int = 0, dtype: torch.dtype = torch.float32) -> bytes:
    random = torch.Generator().manual_seed(seed)
    if isinstance(call, MultiplyPads):
        x = torch.randint(0, 256, (call.blocks, 32), dtype=torch.uint8, generator=random)
    elif isinstance(call, Embed):
        x = torch.randint(0, CONFIG.vocab_size, (call.rows,), dtype=torch.int32, generator=random)
    elif isinstance(call, Product):
        most, of = (P, torch.int32) if call.digits == 4 else (30_000, torch.int16)
        x = torch.randint(0, most, (call.rows, HIDDEN), dtype=of, generator=random)
    else:
        assert isinstance(call, Linear)
        x = torch.randn(call.rows, HIDDEN, generator=random).to(dtype)
    return bytes(tensor_bytes(x))


CALLS: list[tuple[NumericPath, Call]] = [
    ("float", Linear(1, "qkv", 0, None, 1)),
    ("float", Linear(1, "qkv", 1, 2, 4)),
    ("float", Linear(1, "qkv", 0, None, 100)),
    ("float", Embed(1, 5)),
    ("int8", Linear(1, "qkv", 0, None, 1)),
    ("int8", Linear(1, "qkv", 1, 0, 3)),
    ("int8", Linear(1, "qkv", 0, None, 100)),
    ("field", Product(1, "qkv", 0, 1, 4)),
    ("field", Product(1, "qkv", 1, 3, 2)),
    ("field", Product(1, "qkv", 0, 100, 4)),
    ("field", MultiplyPads(1, "qkv", 0, 33)),
]
NAMES = [f"{path}-{type(call).__name__}-{getattr(call, 'rows', 0)}" for path, call in CALLS]
