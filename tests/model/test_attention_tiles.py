"""Tiles of products are exact on integers, whichever way they multiply, and read nothing beyond their rows and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tsqp.arith.jit import kernel
from tsqp.model import attention_tiles
from tsqp.model.attention_tiles import COLUMNS, HEADS, ROWS
from tsqp.model.block_attention import words


class Way(NamedTuple):
    """What queries and weights are, what keys and values are, and which instruction multiplies them."""

    own: torch.dtype
    other: torch.dtype
    instruction: str
    used: int


WAYS = [
    (torch.float32, torch.float32, "HAS_DOT", 0),
    (torch.bfloat16, torch.bfloat16, "HAS_DOT", 0),
    (torch.bfloat16, torch.bfloat16, "HAS_DOT", 1),
    (torch.int16, torch.int8, "PAIR_SUMS", 0),
    (torch.int16, torch.int8, "PAIR_SUMS", 8),
    (torch.int16, torch.int8, "PAIR_SUMS", 16),
]
INSTRUCTIONS = {  # of LLVM; without one it has choices of its own
    ("HAS_DOT", 0): "",
    ("HAS_DOT", 1): "avx512bf16.dpbf16ps.512",
    ("PAIR_SUMS", 0): "",
    ("PAIR_SUMS", 8): "avx2.pmadd.wd",
    ("PAIR_SUMS", 16): "avx512.pmaddw.d.512",
}
WIDTHS = [4, 8, 32, 64, 80, 128]


@pytest.fixture(params=WAYS, ids=["float32", "widened", "vdpbf16ps", "int8", "half", "whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Loops compiled in a test use its instruction or do not."""
    way = Way(*request.param)
    if way.used > getattr(attention_tiles, way.instruction):
        pytest.skip("this processor has no such instruction")
    monkeypatch.setattr(attention_tiles, way.instruction, way.used)
    return way


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers whose products and sums are exact in every order: of integers all that there are."""
    most = {torch.int16: 32767, torch.int8: 127}.get(dtype, 8)
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_words(tensor: torch.Tensor) -> Any:
    """As the tiles take it."""
    if tensor.is_floating_point():
        return words(tensor)
    return tensor.numpy().view(np.int32) if tensor.dtype == torch.int16 else tensor.numpy()


def poisoned(rows: torch.Tensor, more: int) -> Any:
    """``rows`` as the tiles take them, with rows after them in the same memory that would show in every sum."""
    poison = float("nan") if rows.is_floating_point() else 127
    return as_words(torch.cat([rows, rows.new_full((more, rows.shape[1]), poison)]))[: len(rows)]


def sums_of(way: Way) -> torch.dtype:
    return torch.float32 if way.own.is_floating_point else torch.int32


def product(x: torch.Tensor, y: torch.Tensor) -> Any:
    """x·y exactly."""
    return (x.double() @ y.double()).numpy()


@cache
def compiled(loop: Callable[..., None], way: Way) -> Any:
    """The loop of one way, which stays what it was compiled to be: ``way`` has set how before it is first called.

    Not kept on disk: there the ways of one loop would be the same one, as they have the same source.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsqp.arith.jit._directory", "")
        return kernel(loop)


def score(q, k, scores):  # type: ignore[no-untyped-def]
    for j in range(0, len(k), HEADS):
        attention_tiles.score_tile(q, HEADS, k, j, scores, j, k)


def weigh(weights, v, steps, sums):  # type: ignore[no-untyped-def]
    attention_tiles.weigh_tile(weights, 0, v, 2, steps, sums, v, 0)


def multiply(x, rows, panel, out):  # type: ignore[no-untyped-def]
    attention_tiles.multiply_tile(x, 1, rows, panel, len(panel), out, COLUMNS)


def test_each_way_has_its_own_instruction(way: Way) -> None:
    """Otherwise what is tested below would be another one."""
    x, y = numbers(2, 2, dtype=way.own, seed=1), torch.zeros(1, 2 * COLUMNS, dtype=way.own)
    loop = compiled(multiply, way)
    loop(as_words(x), 1, as_words(y), torch.zeros(ROWS, 2 * COLUMNS, dtype=sums_of(way)).numpy())
    code = "".join(loop.inspect_llvm().values())
    found = {name for name in INSTRUCTIONS.values() if name and f"@llvm.x86.{name}(" in code}
    assert found == {INSTRUCTIONS[way.instruction, way.used]} - {""}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keys", [1, 3, 4, 11])
def test_scores(way: Way, width: int, keys: int) -> None:
    q = torch.zeros(2 * HEADS, 256, dtype=way.own)
    q[:, :width] = numbers(2 * HEADS, width, dtype=way.own, seed=1)
    q[:, width:] = 3  # counts for nothing
    k = numbers(keys, width, dtype=way.other, seed=2)
    scores = torch.full((2 * HEADS, 12), 7, dtype=sums_of(way)).numpy()
    compiled(score, way)(as_words(q), poisoned(k, 4), scores)
    assert (scores[HEADS:, :keys] == product(q[HEADS:, :width], k.t())).all()
    assert (scores[:HEADS] == 7).all(), "rows of others"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keys", [1, 2, 5, 8])
def test_weighing(way: Way, width: int, keys: int) -> None:
    v = numbers(2 + keys, width, dtype=way.other, seed=3)
    weights = torch.zeros(HEADS, 10, dtype=way.own)
    weights[:, :keys] = numbers(HEADS, keys, dtype=way.own, seed=4)
    before = numbers(HEADS, 256, dtype=torch.int8, seed=5).to(sums_of(way))
    sums = before.numpy().copy()
    of_word = 1 if way.own == torch.float32 else 2
    compiled(weigh, way)(as_words(weights), poisoned(v, 4), -(-keys // of_word), sums)
    expected = before[:, :width].numpy() + product(weights[:, :keys], v[2:])
    assert (sums[:, :width] == expected).all()


@pytest.mark.parametrize("rows", range(1, ROWS + 1))
@pytest.mark.parametrize("steps", [1, 40])
def test_many_rows(way: Way, rows: int, steps: int) -> None:
    of_word = 1 if way.own == torch.float32 else 2
    x = numbers(1 + rows, steps * of_word, dtype=way.own, seed=6)
    y = numbers(steps, COLUMNS, of_word, dtype=way.other, seed=7)  # numbers of a word side by side
    out = torch.full((ROWS, 2 * COLUMNS), 7, dtype=sums_of(way)).numpy()
    compiled(multiply, way)(poisoned(x, ROWS), rows, as_words(y.to(way.own).view(steps, -1)), out)
    expected = product(x[1:], y.transpose(1, 2).reshape(steps * of_word, COLUMNS))
    assert (out[:rows, COLUMNS:] == expected).all()
    assert (out[rows:] == 7).all()
    assert (out[:, :COLUMNS] == 7).all()
