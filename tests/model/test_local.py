"""Products of this process: those of few rows come in memory that is used again, and never before it is free."""

from __future__ import annotations

import pytest
import torch

from tsqp.arith.self_test import pick_kernel
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import GroupKey
from tsqp.model.int8 import load_int8_groups
from tsqp.model.linear import LinearProduct, load_groups
from tsqp.model.local import LocalLinears
from tsqp.model.meter import Unmetered
from tsqp.wire.slot import KEPT_ROWS

KEYS: list[GroupKey] = [("qkv", 0), ("qkv", 1), ("down", 1), ("lm_head", None)]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "int8"])
def weights(request: pytest.FixtureRequest) -> dict[GroupKey, LinearProduct]:
    checkpoint = open_checkpoint("synthetic:tiny")
    if request.param == "int8":
        cpu = torch.device("cpu")
        return dict(load_int8_groups(checkpoint, pick_kernel(cpu), torch.bfloat16, cpu))
    return dict(load_groups(checkpoint, getattr(torch, request.param)))


def filled(linears: LocalLinears, key: GroupKey, rows: int, seed: int) -> torch.Tensor:
    x = linears.input(key, rows)
    return x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("rows", [1, 3, KEPT_ROWS, KEPT_ROWS + 1])
def test_products_in_any_order(weights: dict[GroupKey, LinearProduct], rows: int) -> None:
    """All are asked for before any is looked at, twice over the same memory."""
    linears = LocalLinears(weights, Unmetered())
    for turn in range(2):
        inputs = [filled(linears, key, rows, seed=turn) for key in KEYS]
        asked = [linears.start(key, x) for key, x in zip(KEYS, inputs, strict=True)]
        expected = [weights[key].product(x.clone()) for key, x in zip(KEYS, inputs, strict=True)]
        products = [one.wait() for one in asked]
        for ours, plain in zip(products, expected, strict=True):
            torch.testing.assert_close(ours, plain)
        for one in asked:
            one.release()


def test_memory_is_used_again_once_it_is_released(weights: dict[GroupKey, LinearProduct]) -> None:
    linears = LocalLinears(weights, Unmetered())

    def product(layer: int) -> tuple[int, torch.Tensor]:
        asked = linears.start(("qkv", layer), filled(linears, ("qkv", layer), 2, seed=layer))
        y = asked.wait()
        kept.append(asked)
        return y.data_ptr(), y

    kept: list = []  # type: ignore[type-arg]
    first, y = product(0)
    before = y.clone()
    second, _ = product(1)
    assert first != second, "the first product was not released"
    assert torch.equal(y, before)
    for one in kept:
        one.release()
        one.release()  # a second time does nothing: no memory is handed out twice
    assert {product(0)[0], product(1)[0]} == {first, second}
    assert product(0)[0] not in (first, second)


def test_other_memory_than_that_handed_out(weights: dict[GroupKey, LinearProduct]) -> None:
    linears = LocalLinears(weights, Unmetered())
    x = filled(linears, ("down", 0), 1, seed=0).clone()
    torch.testing.assert_close(linears.start(("down", 0), x).wait(), weights["down", 0].product(x))
