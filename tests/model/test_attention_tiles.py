"""Tiles of products are exact on integers, whichever way they multiply, and read nothing beyond their rows and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tsqp.arith.jit import kernel
from tsqp.model import attention_tiles
from tsqp.model.attention_tiles import COLUMNS, HAS_DOT, HEADS, ROWS
from tsqp.model.block_attention import words

WAYS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
WIDTHS = [2, 8, 32, 64, 80, 128]


@pytest.fixture(params=WAYS, ids=["float32", "widened", "vdpbf16ps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype of words, and whether the instruction multiplies them: loops compiled in a test take what is set here."""
    dtype, dot = request.param
    if dot and not HAS_DOT:
        pytest.skip("this processor has no vdpbf16ps")
    monkeypatch.setattr(attention_tiles, "HAS_DOT", dot)
    assert isinstance(dtype, torch.dtype)
    return dtype


def integers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers whose products and sums are exact in every order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(rows: torch.Tensor, more: int) -> Any:
    """``rows`` as words, with rows of NaN after them in the same memory."""
    return words(torch.cat([rows, rows.new_full((more, rows.shape[1]), float("nan"))]))[: len(rows)]


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop of its own for each test: what is compiled once would stay."""
    return kernel(loop)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keys", [1, 3, 4, 11])
def test_scores(way: torch.dtype, width: int, keys: int) -> None:
    def score(q, k, scores):  # type: ignore[no-untyped-def]
        for j in range(0, len(k), HEADS):
            attention_tiles.score_tile(q, HEADS, k, j, scores, j, k)

    q = torch.zeros(2 * HEADS, 256, dtype=way)
    q[:, :width] = integers(2 * HEADS, width, dtype=way, seed=1)
    q[:, width:] = 3  # counts for nothing
    k = integers(keys, width, dtype=way, seed=2)
    scores = np.full((2 * HEADS, 12), 7, np.float32)
    compiled(score)(words(q), poisoned(k, 4), scores)
    assert (scores[HEADS:, :keys] == (q[HEADS:, :width].float() @ k.float().t()).numpy()).all()
    assert (scores[:HEADS] == 7).all(), "rows of others"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keys", [1, 2, 5, 8])
def test_weighing(way: torch.dtype, width: int, keys: int) -> None:
    def weigh(weights, v, steps, sums):  # type: ignore[no-untyped-def]
        attention_tiles.weigh_tile(weights, 0, v, 2, steps, sums, v, 0)

    v = integers(2 + keys, width, dtype=way, seed=3)
    weights = torch.zeros(HEADS, 10, dtype=way)
    weights[:, :keys] = integers(HEADS, keys, dtype=way, seed=4)
    before = integers(HEADS, 256, dtype=torch.float32, seed=5)
    sums = before.numpy().copy()
    numbers = 1 if way == torch.float32 else 2
    compiled(weigh)(words(weights), poisoned(v, 4), -(-keys // numbers), sums)
    expected = before[:, :width] + weights[:, :keys].float() @ v[2:].float()
    assert (sums[:, :width] == expected.numpy()).all()


@pytest.mark.parametrize("rows", range(1, ROWS + 1))
@pytest.mark.parametrize("steps", [1, 40])
def test_many_rows(way: torch.dtype, rows: int, steps: int) -> None:
    def multiply(x, rows, panel, out):  # type: ignore[no-untyped-def]
        attention_tiles.multiply_tile(x, 1, rows, panel, len(panel), out, COLUMNS)

    numbers = 1 if way == torch.float32 else 2
    x = integers(1 + rows, steps * numbers, dtype=way, seed=6)
    y = integers(steps, COLUMNS, numbers, dtype=way, seed=7)  # numbers of a word side by side
    out = np.full((ROWS, 2 * COLUMNS), 7, np.float32)
    compiled(multiply)(poisoned(x, ROWS), rows, words(y.view(steps, -1)), out)
    expected = x[1:].float() @ y.transpose(1, 2).reshape(steps * numbers, COLUMNS).float()
    assert (out[:rows, COLUMNS:] == expected.numpy()).all()
    assert (out[rows:] == 7).all()
    assert (out[:, :COLUMNS] == 7).all()
