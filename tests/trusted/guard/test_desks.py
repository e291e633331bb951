"""Memory of the guard is used again: by one product at a time, and nothing of the last one counts for the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.trusted.guard.honest import KEY, HonestConnection, activations, masked, small_weights, verified
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.config.groups import GroupKey
from tsqp.errors import ChannelError, PadError, ProductMismatch
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard.linears import CheckedLinears, PendingProduct

torch.set_num_threads(1)

Build = Callable[..., tuple[CheckedLinears, HonestConnection]]
Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTS = small_weights()
MODES = pytest.mark.parametrize("build", [masked, verified], ids=["masked", "verified"])


def ask(linears: CheckedLinears, rows: int = 1, seed: int = 1) -> PendingProduct:
    """A product of an input in memory of the guard's, as the decoder asks for it."""
    x = linears.input(KEY, rows)
    x.copy_(activations(rows, seed=seed))
    return linears.start(KEY, x)


def plain(linears: CheckedLinears, rows: int, seed: int) -> torch.Tensor:
    """The same product at a desk that is new."""
    return linears.start(KEY, activations(rows, seed=seed)).wait()


@MODES
@pytest.mark.parametrize("rows", [1, 3, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_products_at_one_desk_are_those_of_new_desks(build: Build, rows: int) -> None:
    linears, _ = build(WEIGHTS)
    for seed in range(5):
        pending = ask(linears, rows, seed)
        assert torch.equal(pending.wait(), plain(linears, rows, seed))
        pending.release()


@MODES
def test_a_released_desk_is_the_next_product_s(build: Build) -> None:
    linears, _ = build(WEIGHTS)
    first = ask(linears)
    first.wait()
    first.release()
    second = ask(linears)
    assert second.desk is first.desk
    assert second.desk.sent is first.desk.sent


@MODES
def test_two_products_under_way_share_nothing(build: Build) -> None:
    linears, _ = build(WEIGHTS)
    done = [ask(linears, seed=seed) for seed in (1, 2)]
    for one in done:
        one.wait()
        one.release()
    first, second = ask(linears, seed=3), ask(linears, seed=4)
    for name in ("sent", "scales", "verdicts", "expected", "unchecked_y"):
        assert not np.shares_memory(getattr(first.desk, name), getattr(second.desk, name)), name
    assert torch.equal(first.wait(), plain(linears, 1, 3))
    assert torch.equal(second.wait(), plain(linears, 1, 4))


@MODES
def test_the_line_s_memory_of_many_rows_ends_with_the_product(build: Build) -> None:
    """It is the largest there is, and is not used again: nothing keeps it while the product is looked at."""
    linears, line = build(WEIGHTS)
    given: list[weakref.ref[Any]] = []

    def memory(size: int) -> memoryview:
        block = np.zeros(size, np.uint8)
        given.append(weakref.ref(block))
        return block.data.cast("B")

    line.memory = memory
    pending = ask(linears, BLOCK_ROWS + 1)
    assert given[0]() is not None
    pending.wait()
    assert given[0]() is None


@MODES
def test_a_desk_released_twice_is_idle_once(build: Build) -> None:
    linears, _ = build(WEIGHTS)
    pending = ask(linears)
    pending.wait()
    for _ in range(2):
        pending.release()
    assert ask(linears).desk is not ask(linears).desk


@MODES
def test_a_product_that_is_not_there_is_not_released(build: Build) -> None:
    linears, _ = build(WEIGHTS)
    pending = ask(linears)
    pending.release()
    assert ask(linears).desk is not pending.desk
    assert torch.equal(pending.wait(), plain(linears, 1, 1))


@MODES
def test_a_product_that_is_still_looked_at_keeps_its_desk(build: Build) -> None:
    linears, _ = build(WEIGHTS)
    pending = ask(linears, seed=1)
    product = pending.wait()
    before = product.clone()
    ask(linears, seed=2).wait()
    assert torch.equal(product, before)


@MODES
def test_the_verdict_on_one_product_is_none_on_the_next(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that says nothing about a row leaves it without a verdict, at whatever desk."""
    linears, line = build(WEIGHTS)
    pending = ask(linears)
    pending.wait()
    pending.release()
    again = ask(linears)
    monkeypatch.setattr(kernels, "verify_and_unmask", lambda *_: None)
    with pytest.raises(ProductMismatch):
        again.wait()
    assert isinstance(line.dead, ProductMismatch)


@MODES
def test_a_reply_that_lay_there_since_the_last_call_is_wrong(build: Build) -> None:
    """A worker that answers without computing: its memory holds the right product of the call before."""
    linears, line = build(WEIGHTS)
    old: list[Array] = []
    line.change = lambda reply: old.append(reply.copy())
    pending = ask(linears, seed=1)
    pending.wait()
    pending.release()
    line.change = lambda reply: np.copyto(reply, old[0])
    with pytest.raises(ProductMismatch):
        ask(linears, seed=2).wait()


@MODES
def test_after_a_failure_no_desk_is_left_and_the_first_error_stays(build: Build) -> None:
    linears, line = build(WEIGHTS)
    pending, x = ask(linears), linears.input(KEY, 2)
    pending.wait()
    pending.release()
    line.change = lambda reply: reply.fill(0)
    with pytest.raises(ProductMismatch):
        linears.start(KEY, activations(3)).wait()
    for call in (lambda: linears.input(KEY, 1), lambda: linears.start(KEY, x)):
        with pytest.raises((ChannelError, PadError)) as caught:
            call()
        assert caught.value is line.dead


@MODES
def test_an_input_handed_out_for_another_group_is_memory_like_any_other(build: Build) -> None:
    other: GroupKey = ("o", 0)
    linears, _ = build({KEY: WEIGHTS[KEY], other: WEIGHTS[KEY][:7].contiguous()})
    x = linears.input(KEY, 2).copy_(activations(2))
    assert linears.start(other, x).wait().shape == (2, 7)
