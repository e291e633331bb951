"""The guard's essentials, each in milliseconds. ``test_mutants.py`` shows that they fail where the guard does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.trusted.guard.honest import (
    KEY,
    HonestConnection,
    activations,
    guarded,
    masked,
    send,
    small_weights,
    verified,
)
from tests.trusted.guard.scan import shared_pads
from tsqp.arith.expand import BLOCK_ROWS, AesKeyStream
from tsqp.arith.loops import quantise_row
from tsqp.arith.modulus import P
from tsqp.errors import ChannelError, CheckFailed, PadError, PadReused, ProductMismatch, ReplyRangeError
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard import linears as guarded_linears
from tsqp.trusted.guard.linears import VerifiedLinears
from tsqp.trusted.guard.pads import PadBlock, Ratchet

torch.set_num_threads(1)

Build = Callable[..., tuple[VerifiedLinears, HonestConnection]]
Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTS = small_weights()
ROWS = 37  # two blocks of pads and a part of one
MODES = pytest.mark.parametrize("build", [masked, verified], ids=["masked", "verified"])


def plain_product(x: Array, limit: int) -> Array:
    """The formula of docs/masking.md §1, for scales s_w of 1 and no bias: float32 (R, N)."""
    scales = np.abs(x).max(axis=1) / np.float32(limit)
    digits = np.clip(np.round(x / scales[:, None]), -limit, limit).astype(np.int64)
    exact: Array = digits @ WEIGHTS[KEY].numpy().astype(np.int64).T
    return np.asarray(exact.astype(np.float32) * scales[:, None])


@MODES
@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, ROWS])
def test_an_honest_product_is_that_of_the_formula(build: Build, rows: int) -> None:
    linears, _ = build(WEIGHTS)
    for seed in range(3):
        x = activations(rows, seed=seed)
        got = linears.start(KEY, x).wait().numpy()
        assert np.array_equal(got, plain_product(x.numpy(), linears.groups[KEY].limit))


@MODES
@pytest.mark.parametrize("row", [0, BLOCK_ROWS - 1, BLOCK_ROWS, ROWS - 1])
def test_one_wrong_element_is_found_in_every_row(build: Build, row: int) -> None:
    linears, line = build(WEIGHTS)

    def change(reply: Array) -> None:
        reply[row, -1] = (int(reply[row, -1]) + 1) % P

    line.change = change
    with pytest.raises(ProductMismatch):
        linears.start(KEY, activations(ROWS)).wait()


@MODES
@pytest.mark.parametrize("blind", [0, 1])
def test_an_error_that_one_check_vector_does_not_see(build: Build, blind: int) -> None:
    linears, line = build(WEIGHTS)
    unseen = linears.groups[KEY].check_vectors[blind, :2].astype(np.int64)[::-1] * (
        1,
        -1,
    )  # times that vector: 0 mod p

    def change(reply: Array) -> None:
        reply[0, :2] = (reply[0, :2] + unseen) % P

    line.change = change
    with pytest.raises(ProductMismatch):
        linears.start(KEY, activations(1)).wait()


def test_check_vectors_are_of_one_connection_only() -> None:
    vectors = [group.check_vectors.tobytes() for _ in range(2) for group in guarded(WEIGHTS).values()]
    assert len(set(vectors)) == len(vectors)


@MODES
def test_another_way_to_write_the_right_number_is_out_of_range(build: Build) -> None:
    """y + p satisfies every equation mod p."""
    linears, line = build(WEIGHTS)

    def change(reply: Array) -> None:
        reply[-1, 0] += np.uint32(P)

    line.change = change
    with pytest.raises(ReplyRangeError):
        linears.start(KEY, activations(ROWS)).wait()


@MODES
def test_after_a_failure_nothing_is_checked_with_the_same_vectors(build: Build) -> None:
    linears, line = build(WEIGHTS)
    under_way = linears.start(KEY, activations(2))
    before = [group.check_vectors.copy() for group in linears.groups.values()]
    line.change = lambda reply: reply.fill(0)
    with pytest.raises(CheckFailed):
        linears.start(KEY, activations(2)).wait()
    assert isinstance(line.dead, CheckFailed)
    assert not any(
        (group.check_vectors == old).any() for group, old in zip(linears.groups.values(), before, strict=True)
    )
    line.dead = None  # were the line not dead, or its death forgotten: right products are refused all the same
    with pytest.raises((ChannelError, PadError)):
        under_way.wait()


@MODES
def test_a_reply_is_read_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that changes its reply after the trusted side has begun to look at it changes nothing."""
    linears, _ = build(WEIGHTS)
    x = activations(ROWS)
    pending = linears.start(KEY, x)
    reply: Array = pending.reply.reply  # type: ignore[attr-defined]
    real = kernels.verify_and_unmask
    calls: list[int] = []

    def accept(unchecked_y: Array, *rest: Any) -> None:
        assert not np.shares_memory(unchecked_y, reply)
        first, end = rest[-2:]
        calls.append(first)
        reply[first:end] = 1
        real(unchecked_y, *rest)

    monkeypatch.setattr(kernels, "verify_and_unmask", accept)
    got = pending.wait().numpy()
    assert sorted(calls) == [0, BLOCK_ROWS, 2 * BLOCK_ROWS]
    assert np.array_equal(got, plain_product(x.numpy(), linears.groups[KEY].limit))


@pytest.mark.parametrize("with_pads", [True, False], ids=["masked", "verified"])
def test_what_was_written_for_the_worker_is_not_read_back(with_pads: bool) -> None:
    """All numbers of a row lie in one and the same place, as if the worker changed each as soon as it was written."""
    x, projections = activations(1).numpy(), np.arange(1, 49, dtype=np.uint32)[None]
    place = np.zeros(1, np.uint32 if with_pads else np.int16)
    out = np.lib.stride_tricks.as_strided(place, x.shape, (place.itemsize, 0))
    r = np.arange(48, dtype=np.uint32)[None] * np.uint32(40_000_000)
    _, scales, expected, verdicts = send(x, 999, projections, r.copy() if with_pads else None, out)
    x_field = (np.round(x / scales[0]).astype(np.int64) + with_pads * r.astype(np.int64)) % P
    assert verdicts.tolist() == [kernels.OK]
    assert expected.tolist() == [[int(x_field[0] @ projections[0].astype(np.int64) % P)]]


class Unsteady(np.ndarray[Any, np.dtype[np.float32]]):
    """A row whose largest number is 1 when that is looked for, and 1,000 afterwards."""

    def view(self, *arguments: Any, **_: Any) -> Any:
        return np.ones(len(self), np.float32).view(*arguments)


def test_no_activation_leaves_its_bound_whatever_its_scale() -> None:
    """For finite rows the clamp changes nothing; the proof of no overflow rests on it and not on that."""
    digits = np.empty(4, np.int32)
    row = np.array([1000, -1000, 0.5, 1], np.float32).view(Unsteady)
    loop = getattr(quantise_row, "py_func", quantise_row)  # as Python, compiled or not
    loop(row, np.float32(127), digits)
    assert digits.tolist() == [127, -127, 64, 127]  # 63.5 to the even one


def test_equal_inputs_reach_the_worker_under_different_pads() -> None:
    """In one call, in two calls, and on two connections."""
    x, sent = torch.zeros(ROWS, 48), []
    for linears, line in (masked(WEIGHTS), masked(WEIGHTS)):
        for _ in range(2):
            linears.start(KEY, x)
        sent += line.sent
    assert not shared_pads(sent)


def test_equal_rows_of_a_block_reach_the_worker_under_different_pads() -> None:
    linears, line = masked(WEIGHTS)
    for rows in (1, 3, 1):
        linears.start(KEY, torch.zeros(rows, 48))
    assert not shared_pads(line.sent)


@pytest.mark.parametrize("ready", [0, 5], ids=["whole blocks", "in the middle of a block"])
def test_pads_of_a_call_that_is_interrupted_are_erased_wherever_they_lie(
    ready: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears, line = masked(WEIGHTS)
    if ready:
        linears.start(KEY, activations(BLOCK_ROWS - ready))
    sent, rooms = len(line.sent), list[Array]()

    def interrupted(*arguments: Any) -> None:
        pads = arguments[4]
        assert (pads < P).all()
        rooms.append(pads)
        if sum(len(one) for one in rooms) == 4 * BLOCK_ROWS:
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "quantise_and_mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        linears.start(KEY, activations(4 * BLOCK_ROWS))
    assert [len(one) for one in rooms] == ([5, 3 * BLOCK_ROWS, 11] if ready else [4 * BLOCK_ROWS])
    assert all(set(one.flat) == {kernels.ERASED} for one in rooms)
    assert len(line.sent) == sent


def test_used_pads_and_their_products_are_erased() -> None:
    linears, _ = masked(WEIGHTS)
    pending = linears.start(KEY, activations(3))
    (pads,) = pending.slices
    assert pads.block is not None
    assert set(pads.pads(pending.group.in_features).flat) == {kernels.ERASED}
    pending.wait()
    assert set(pads.products().flat) == {kernels.ERASED}
    assert not any(pads.block._key)
    unused = pads.block.pads(3, BLOCK_ROWS - 3, 48)
    assert (unused < P).all()


def test_an_erased_pad_masks_nothing() -> None:
    linears, line = masked(WEIGHTS)
    (pads,) = linears.start(KEY, activations(1)).slices
    assert pads.block is not None
    pads.block._used = 0  # what must not happen
    with pytest.raises(PadReused):
        linears.start(KEY, activations(1))
    assert len(line.sent) == 1


def test_a_row_is_handed_out_once() -> None:
    block = PadBlock(bytearray(range(32)))
    assert [block.claim(rows) for rows in (1, 5, 10)] == [0, 1, 6]
    with pytest.raises(PadReused):
        block.claim(1)


def test_the_ratchet_goes_on() -> None:
    stream = bytearray(64)
    AesKeyStream(bytes(range(32))).fill(memoryview(stream))
    following = bytearray(64)
    AesKeyStream(bytes(stream[:32])).fill(memoryview(following))
    ratchet = Ratchet(bytes(range(32)))
    assert [ratchet.next_key(), ratchet.next_key()] == [stream[32:], following[32:]]


def test_another_process_gets_no_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    linears, line = masked(WEIGHTS)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(PadReused, match="fork"):
        linears.pads.take(KEY, 1)
    with pytest.raises(PadReused, match="fork"):
        linears.start(KEY, activations(1))
    assert not line.sent


@MODES
def test_another_process_checks_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its check vectors are zeros, with which any product would pass."""
    linears, line = build(WEIGHTS)
    pending = linears.start(KEY, activations(1))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(PadReused, match="fork"):
        pending.wait()
    assert linears.products_checked == 0
    monkeypatch.undo()
    linears, line = build(WEIGHTS)
    x = linears.input(KEY, 1)
    x.fill_(1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(PadReused, match="fork"):
        linears.start(KEY, x)
    assert not line.sent


def test_slices_of_little_work_stay_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waking another one takes longer: what counts is rows times width."""
    asked: list[tuple[int, int]] = []

    class Threads:
        def run(self, work: Callable[[int, int], None], count: int, *, least: int) -> None:
            asked.append((count, least))
            work(0, count)

    monkeypatch.setattr(guarded_linears, "row_threads", Threads)
    linears, _ = verified(WEIGHTS)
    verdicts = np.empty(3, np.uint8)
    for width in (64, 1 << 17):
        linears._judge(lambda first, end: verdicts.fill(kernels.OK), [], verdicts, width)
    assert [least for _, least in asked] == [128, 2]
