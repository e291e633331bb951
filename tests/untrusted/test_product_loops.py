"""Products by compiled code alone have the bits of ``RowWork``, shared by any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.modulus import P
from tsqp.arith.row_threads import RowWork
from tsqp.model import bfloat16_rows
from tsqp.model.attention_tiles import HAS_DOT
from tsqp.untrusted import product_loops as loops
from tsqp.untrusted.compiled_calls import Crew
from tsqp.untrusted.paths.call_table import numbers_of
from tsqp.wire.transport.shm.spin import CROWDED_S, REST_S, SPIN_S

needs_digits = pytest.mark.skipif(not FewRowsKernel.supported(), reason="no vpdpbusd here")
needs_bfloat16 = pytest.mark.skipif(not HAS_DOT, reason="no vdpbf16ps here")


@pytest.fixture(scope="module", params=[1, 2, 4])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    with closing(Crew(request.param)) as crew:
        yield crew


def multiplied(work: RowWork, out: torch.Tensor, crew: Crew, parts: int) -> torch.Tensor:
    """What the crew makes of it, in a copy of the memory that it writes to."""
    numbers = numbers_of(work)
    assert numbers is not None
    product = np.array(numbers, np.int64)
    product[loops.PARTS] = min(parts, work.rows)
    crew.make_room(int(product[loops.DIGITS] * product[loops.ROWS] * product[loops.INNER]))
    out.fill_(77)
    assert loops.multiply(product, crew.state, np.zeros(2, np.int64))
    return out.clone()


def expected(work: RowWork, out: torch.Tensor) -> torch.Tensor:
    out.fill_(33)
    work()
    return out.clone()


def of_digits(rows: int, digits: int, inner: int, columns: int, seed: int) -> tuple[RowWork, torch.Tensor]:
    kernel, generator = FewRowsKernel(), torch.Generator().manual_seed(seed)
    w = torch.randint(-127, 128, (columns, inner), dtype=torch.int8, generator=generator)
    low, high, dtype = (0, P, torch.int32) if digits == 4 else (-32_639, 32_640, torch.int16)
    x = torch.randint(low, high, (rows, inner), generator=generator).to(dtype)
    out = torch.empty(rows, columns, dtype=torch.int32)
    work = kernel.prepared(x, digits, w, kernel.offsets(w), out)
    assert work is not None
    return work, out


def of_bfloat16(rows: int, vectors: int, columns: int, bias: bool, seed: int) -> tuple[RowWork, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, 32 * vectors, generator=generator).bfloat16() for n in (columns, rows))
    added = torch.randn(columns, generator=generator).bfloat16() if bias else None
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    return bfloat16_rows.prepared(x, weight, added, out), out


SHAPES = {"columns": st.integers(1, 70), "parts": st.integers(1, 9), "seed": st.integers(0, 99)}


@needs_digits
@pytest.mark.parametrize("digits", [2, 4])
@given(rows=st.integers(1, 8), inner=st.integers(1, 200), **SHAPES)
def test_products_of_digits(
    crew: Crew, digits: int, rows: int, inner: int, columns: int, parts: int, seed: int
) -> None:
    work, out = of_digits(rows, digits, inner, columns, seed)
    assert torch.equal(multiplied(work, out, crew, parts), expected(work, out))


@needs_bfloat16
@given(rows=st.integers(1, 4), vectors=st.integers(1, 5), bias=st.booleans(), **SHAPES)
def test_products_of_bfloat16(
    crew: Crew, rows: int, vectors: int, bias: bool, columns: int, parts: int, seed: int
) -> None:
    work, out = of_bfloat16(rows, vectors, columns, bias, seed)
    assert torch.equal(multiplied(work, out, crew, parts), expected(work, out))


@needs_digits
def test_products_one_after_another_are_never_mixed_up(crew: Crew) -> None:
    """Helpers wake up late, from a product that is over: each part is still of the product that it is taken from."""
    works = [of_digits(1 + seed % 3, 4, 40 + seed, 30 + 10 * seed, seed) for seed in range(5)]
    right = [expected(*one) for one in works]
    for turn in range(400):
        which = turn % len(works)
        assert torch.equal(multiplied(*works[which], crew, 1 + turn % 16), right[which]), turn


def test_no_product_is_done_at_once(crew: Crew) -> None:
    assert loops.multiply(np.zeros(loops.PRODUCT_NUMBERS, np.int64), crew.state, np.zeros(2, np.int64))


def test_a_crew_ends(crew: Crew) -> None:
    other = Crew(3)
    threads = list(other._threads)
    assert [thread.is_alive() for thread in threads] == [True] * 2
    for _ in range(2):
        other.close()
    assert [thread.is_alive() for thread in threads] == [False] * 2


def test_work_that_there_is_no_loop_for() -> None:
    assert numbers_of(RowWork(lambda *_: None, 3, (), 1)) is None


def test_who_waits_for_a_product_spins_as_who_waits_for_a_call() -> None:
    found = [int(ns) for ns in (loops._SPIN_NS, loops._CROWDED_NS, loops._REST_NS)]
    assert found == [round(seconds * 1e9) for seconds in (SPIN_S, CROWDED_S, REST_S)]
