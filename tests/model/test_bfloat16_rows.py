"""Few rows of bfloat16: the loops are exact where sums are, near as the library elsewhere, and write nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.families import tiny_model
from tsqp.arith import row_threads as threads
from tsqp.checkpoint import open_checkpoint
from tsqp.model import bfloat16_rows
from tsqp.model.attention_tiles import HAS_DOT, LANES
from tsqp.model.bfloat16_rows import FEW, has_loops, product, serves
from tsqp.model.compiled_rows import VECTOR
from tsqp.model.linear import load_group

pytestmark = pytest.mark.skipif(not HAS_DOT, reason="this processor has no vdpbf16ps")

ROWS, WIDTHS, INNER = st.integers(1, FEW + 1), st.integers(1, 3 * LANES + 1), st.integers(1, 5)
SENTINEL = 77.0


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Numbers from -8 to 8: bfloat16 holds them, and float32 each sum of their products."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(rows=ROWS, width=WIDTHS, vectors=INNER, biased=st.booleans(), seed=st.integers(0, 2**32))
def test_exact_sums_are_rounded_once(rows: int, width: int, vectors: int, biased: bool, seed: int) -> None:
    x, w = (whole_numbers(n, vectors * VECTOR // 2, seed=seed + i) for i, n in enumerate((rows, width)))
    bias = whole_numbers(width, seed=seed + 2) if biased else None
    around = torch.full((rows + 2, width), SENTINEL, dtype=torch.bfloat16)
    out = around[1:-1]
    assert product(x, w, bias, out) is out
    exact = x.long() @ w.long().t() + (0 if bias is None else bias.long())
    assert torch.equal(out, exact.float().bfloat16())
    assert torch.equal(product(x, w, bias), out)
    assert (around[0] == SENTINEL).all()
    assert (around[-1] == SENTINEL).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_threads_share_the_columns(rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_rows, "LEAST_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(threads, "row_threads", threads.RowThreads)
    x, w = whole_numbers(rows, 64, seed=1), whole_numbers(50, 64, seed=2)
    assert torch.equal(product(x, w, None), (x.long() @ w.long().t()).float().bfloat16())


@pytest.mark.parametrize("rows", range(1, FEW + 1))
def test_sums_are_as_near_as_those_of_the_library(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(n, 2048, generator=generator).bfloat16() for n in (rows, 100))
    exact = x.double() @ w.double().t()
    ours, theirs = ((found.double() - exact).norm() for found in (product(x, w, None), F.linear(x, w)))
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so_in_its_own_row(value: float) -> None:
    x, w = whole_numbers(3, 32, seed=1), whole_numbers(5, 32, seed=2).abs() + 1
    x[1, 7] = value
    found = product(x, w, None).isfinite()
    assert not found[1].any()
    assert found[0].all()
    assert found[2].all()


def test_only_few_plain_rows_are_served() -> None:
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert has_loops(weight)
    assert not has_loops(weight.float())
    assert not has_loops(weight[:, :40])
    assert not has_loops(torch.zeros(8, 40, dtype=torch.bfloat16))
    rows = torch.zeros(FEW + 1, 64, dtype=torch.bfloat16)
    assert serves(rows[:FEW], None)
    assert not serves(rows, None)
    assert not serves(rows[:0], None)
    assert not serves(rows[:1].float(), None)
    assert not serves(rows[:2], torch.empty(8, 2, dtype=torch.bfloat16).t())


def test_a_group_of_weights_multiplies_few_rows_by_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama-biases").directory))
    linear = load_group(checkpoint, ("qkv", 1), torch.bfloat16)
    assert linear.loops
    calls: list[int] = []

    def counted(x: torch.Tensor, *more: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return product(x, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(bfloat16_rows, "product", counted)
    assert linear.bias is not None
    for rows in (1, FEW, FEW + 1):
        x = torch.randn(rows, linear.group.in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
        for part in (None, 1):
            first, end = linear.group.part_rows(part)
            expected = F.linear(x.float(), linear.weight[first:end].float(), linear.bias[first:end].float())
            place = torch.empty(rows, end - first, dtype=torch.bfloat16)
            assert linear.product(x, part, out=place) is place
            torch.testing.assert_close(place, expected.bfloat16(), rtol=2**-7, atol=1e-3)
            torch.testing.assert_close(linear.product(x, part), expected.bfloat16(), rtol=2**-7, atol=1e-3)
    assert calls == [1] * 4 + [FEW] * 4


def test_without_the_instruction_the_library_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_rows, "HAS_DOT", False)
    linear = load_group(open_checkpoint(str(tiny_model("llama").directory)), ("o", 0), torch.bfloat16)
    assert not linear.loops
    x = torch.randn(1, linear.group.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(linear.product(x), F.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize(("rows", "share"), [(1, 1), (4, 1), (8, 2), (FEW, max(1, FEW // 4))])
def test_more_rows_are_worth_a_second_thread_for_fewer_weights(rows: int, share: int) -> None:
    out = torch.empty(rows, 5, dtype=torch.bfloat16)
    work = bfloat16_rows.prepared(whole_numbers(rows, 64, seed=1), whole_numbers(5, 64, seed=2), None, out)
    assert work.least == bfloat16_rows.LEAST_BYTES // (128 * share)
