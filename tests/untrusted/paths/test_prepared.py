"""A product that is bound to its memory is the same product, and is taken for no other one."""

from __future__ import annotations

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG
from tsqp.arith.modulus import P
from tsqp.config.groups import GroupName, linear_groups
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Run
from tsqp.untrusted.paths.field import FieldOperators, FieldWorkerWeights
from tsqp.untrusted.paths.plain import Operators
from tsqp.untrusted.paths.prepared import MOST, MOST_ROWS, Prepared
from tsqp.wire.messages import Call, Embed, Linear, Product
from tsqp.wire.payload import bytes_tensor, tensor_bytes, wire_format

CPU = torch.device("cpu")
ONE = Product(1, "qkv", 0, 1, 4)
OTHERS: dict[str, tuple[Call, bytes]] = {
    "memory": (ONE, b"there"),
    "layer": (Product(1, "qkv", 1, 1, 4), b"here"),
    "group": (Product(1, "o", 0, 1, 4), b"here"),
    "rows": (Product(1, "qkv", 0, 2, 4), b"here"),
    "digits": (Product(1, "qkv", 0, 1, 2), b"here"),
    "kind": (Linear(1, "qkv", 0, 4, 1), b"here"),
    "no memory": (ONE, b""),
}


def ran(prepared: Prepared, call: Call, place: bytes) -> list[str]:
    RAN.clear()
    assert prepared.run(call, place) == bool(RAN)
    return list(RAN)


RAN: list[str] = []


def note(name: str) -> Run:
    return lambda: RAN.append(name)


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_prepared_is_for_the_same_call_only(other: str) -> None:
    prepared = Prepared()
    prepared.keep(ONE, b"here", note("one"))
    assert ran(prepared, Product(99, "qkv", 0, 1, 4), b"here") == ["one"], "another id"
    assert ran(prepared, *OTHERS[other]) == []


def test_a_part_is_not_the_whole() -> None:
    prepared = Prepared()
    prepared.keep(Linear(1, "qkv", 0, None, 1), b"here", note("all"))
    assert ran(prepared, Linear(1, "qkv", 0, 0, 1), b"here") == []


def test_what_does_not_come_again_is_not_kept() -> None:
    prepared = Prepared()
    for call, place in ((Product(1, "qkv", 0, MOST_ROWS + 1, 4), b"here"), (ONE, b""), (Embed(1, 1), b"here")):
        prepared.keep(call, place, note("kept"))
        assert ran(prepared, call, place) == []


def test_what_is_kept_is_bounded() -> None:
    prepared = Prepared()
    for number in range(MOST + 5):
        prepared.keep(ONE, b"%d" % number, note("kept"))
    assert len(prepared._runs) <= MOST


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("digits", [2, 4])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("offset", [0, 1])
def test_field_products_in_the_same_memory(name: GroupName, digits: int, rows: int, offset: int) -> None:
    """Whatever lies there at the time; also where it lies at an odd address, and is copied before it is multiplied."""
    weights, group = FieldWorkerWeights.load(CHECKPOINT, CPU), linear_groups(CONFIG)[name]
    once, again = FieldOperators(weights), FieldOperators(weights)
    dtype, most = (torch.int32, P) if digits == 4 else (torch.int16, 30_000)
    size = rows * group.in_features * dtype.itemsize
    payload = memoryview(bytearray(size + 1))[offset : offset + size]
    out = memoryview(bytearray(rows * group.out_features * 4))
    for layer in (0, 1, 0, 1):
        payload[:] = tensor_bytes(torch.randint(0, most, (rows, group.in_features), dtype=dtype))
        call = Product(1, name, layer, rows, digits)  # type: ignore[arg-type]
        assert again(call, [payload], out, b"place") is out
        expected = once(call, [payload])
        assert isinstance(expected, memoryview)
        assert bytes(out) == bytes(expected)
    assert len(again.prepared._runs) == (0 if offset else 2)


@pytest.mark.parametrize("part", [None, 0, 2])
def test_float_products_in_the_same_memory(part: int | None) -> None:
    weights, group = ModelWeights.load(CHECKPOINT, "float32", CPU), linear_groups(CONFIG)["qkv"]
    once, again = (Operators(weights, wire_format("float32")) for _ in range(2))
    first, end = group.part_rows(part)
    payload, out = (memoryview(bytearray(4 * width)) for width in (group.in_features, end - first))
    for layer in (0, 1, 0, 1):
        x = torch.randn(1, group.in_features)
        payload[:] = tensor_bytes(x)
        call = Linear(1, "qkv", layer, part, 1)
        assert again(call, [payload], out, b"place") is out
        expected = once(call, [payload])
        assert isinstance(expected, memoryview)
        shape = (1, end - first)
        assert torch.equal(bytes_tensor(out, torch.float32, shape), bytes_tensor(expected, torch.float32, shape))
    assert len(again.prepared._runs) == 2
