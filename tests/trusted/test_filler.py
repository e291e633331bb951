"""When pads are made ahead, and how many: decisions, by a pool that only counts."""

from __future__ import annotations

import time

import pytest

from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.secret_memory import secret_memory
from tsqp.config.groups import GroupKey
from tsqp.errors import ChannelClosed, ProductMismatch
from tsqp.trusted.filler import GIVE_BYTES, IDLE_S, SPARE_BYTES, PadFiller
from tsqp.trusted.guard.pool import MAKE_BLOCKS

ONE: GroupKey = ("qkv", 0)
TWO: GroupKey = ("o", 0)
HEAD: GroupKey = ("lm_head", None)


class Counts:
    """See PadPool: rows that are ready, and how many blocks were asked for at a time."""

    def __init__(self) -> None:
        self.rows: dict[GroupKey, int] = {ONE: 0, TWO: 0, HEAD: 0}
        self.keys = tuple(self.rows)
        self.recent: dict[GroupKey, tuple[float, int]] = {}
        self.failures: list[Exception] = []
        self.error: Exception | None = None
        self.made: list[tuple[GroupKey, int]] = []

    def ready(self, key: GroupKey) -> int:
        return self.rows[key]

    def make(self, key: GroupKey, count: int) -> None:
        if self.error is not None:
            raise self.error
        self.made.append((key, count))
        self.rows[key] += count * BLOCK_ROWS


def filler_of(pool: Counts, blocks: dict[GroupKey, int]) -> PadFiller:
    return PadFiller(pool, blocks)  # type: ignore[arg-type]


def test_the_group_with_the_least_of_its_share_is_next() -> None:
    pool = Counts()
    pool.rows |= {ONE: 3 * BLOCK_ROWS, TWO: 2 * BLOCK_ROWS, HEAD: BLOCK_ROWS}
    assert filler_of(pool, {ONE: 4, TWO: 8, HEAD: 2})._make_some(idle=True)
    assert pool.made == [(TWO, 6)]


def test_no_more_is_made_at_once_than_is_multiplied_together() -> None:
    pool = Counts()
    filler_of(pool, {ONE: MAKE_BLOCKS * 2 + 3}).fill()
    assert pool.made == [(ONE, MAKE_BLOCKS), (ONE, MAKE_BLOCKS), (ONE, 3)]


def test_whole_answers_need_the_head_and_every_group() -> None:
    pool = Counts()
    assert filler_of(pool, {ONE: 4, TWO: 8, HEAD: 2}).whole_answers == 2 * BLOCK_ROWS
    assert filler_of(pool, {ONE: 4, TWO: 8, HEAD: 0}).whole_answers == 0


def test_groups_without_a_share_are_left_out() -> None:
    pool = Counts()
    filler = filler_of(pool, {ONE: 2, TWO: 0, HEAD: 0})
    filler.fill()
    assert pool.made == [(ONE, 2)]
    assert filler.blocks == {ONE: 2}


@pytest.mark.parametrize(
    ("blocks", "ahead"),
    [({ONE: 3, TWO: 5, HEAD: 1}, 3 * BLOCK_ROWS), ({HEAD: 4}, 0), ({}, 0)],
    ids=["least of the layers", "LM head alone", "none"],
)
def test_ahead_is_the_least_of_the_layers(blocks: dict[GroupKey, int], ahead: int) -> None:
    assert filler_of(Counts(), blocks).ahead == ahead


def test_an_answer_needs_the_lm_head_and_a_prompt_does_not() -> None:
    pool = Counts()
    pool.rows |= {ONE: 40, TWO: 30, HEAD: 7}
    filler = filler_of(pool, {ONE: 3, TWO: 3, HEAD: 1})
    assert filler.ready(answer=True) == 7
    assert filler.ready(answer=False) == 30


@pytest.mark.parametrize(
    ("rows", "ready", "made"),
    [
        (1, BLOCK_ROWS - 1, 2),
        (1, BLOCK_ROWS, 0),  # a whole block is left
        (BLOCK_ROWS, 0, 2),
        (BLOCK_ROWS + 1, 0, 0),  # a prompt, not an answer
        (0, 0, 0),
    ],
)
def test_while_busy_only_an_answer_on_its_last_block_is_served(rows: int, ready: int, made: int) -> None:
    pool = Counts()
    pool.rows[ONE] = ready
    pool.recent[ONE] = time.monotonic(), rows
    assert filler_of(pool, {ONE: 5})._make_some(idle=False) == bool(made)
    assert pool.made == ([(ONE, made)] if made else [])


def test_nothing_is_made_while_busy_before_any_call() -> None:
    pool = Counts()
    assert not filler_of(pool, {ONE: 5})._make_some(idle=False)
    assert not pool.made


def test_idle_is_no_pass_under_way_and_no_call_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Counts()
    filler = filler_of(pool, {ONE: 5})
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert filler._is_idle()  # nothing was ever called
    pool.recent = {ONE: (now - 3 * IDLE_S, 1), TWO: (now - IDLE_S / 2, 1)}
    assert not filler._is_idle()  # the latest counts
    now += IDLE_S
    assert filler._is_idle()
    filler.busy = lambda: True
    assert not filler._is_idle()


def test_after_close_nothing_is_made() -> None:
    pool = Counts()
    filler = filler_of(pool, {ONE: 5})
    filler.close()
    filler.close()
    filler.fill()
    assert not pool.made


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ProductMismatch("the dealer cheats"), ProductMismatch), (RuntimeError("no memory"), ChannelClosed)],
    ids=["named", "another"],
)
def test_the_thread_ends_with_what_it_met_and_leaves_it_to_the_next_call(
    error: Exception, expected: type[Exception]
) -> None:
    pool = Counts()
    pool.error = error
    filler = filler_of(pool, {ONE: 5})
    filler.start()
    filler._thread.join(20)
    assert not filler._thread.is_alive()
    assert type(filler.failure) is expected
    assert str(error) in str(filler.failure)
    filler.close()


def test_the_thread_fills_the_pool_and_ends_with_close() -> None:
    pool = Counts()
    filler = filler_of(pool, {ONE: 3, HEAD: 1})
    real = pool.make

    def make(key: GroupKey, count: int) -> None:
        real(key, count)
        if len(pool.made) == 2:
            filler._stop.set()

    pool.make = make  # type: ignore[method-assign]
    filler.start()
    filler._thread.join(20)
    assert not filler._thread.is_alive()
    assert sorted(pool.made, key=str) == [(HEAD, 1), (ONE, 3)]


@pytest.mark.parametrize(
    ("kept_from_it", "expected"), [(False, [3 * BLOCK_ROWS]), (True, [])], ids=["filled", "kept from filling"]
)
def test_the_thread_says_once_that_the_pool_is_full(kept_from_it: bool, expected: list[int]) -> None:
    """At its second and third look it is as full as at the first. One that is not idle does not call a pool full."""
    pool, told = Counts(), list[int]()
    filler = filler_of(pool, {ONE: 3})
    looks = iter(range(3))

    def busy() -> bool:
        if next(looks, None) is None:
            filler._stop.set()
        return kept_from_it

    filler.busy, filler.filled = busy, lambda: told.append(pool.rows[ONE])
    filler.start()
    filler._thread.join(20)
    assert not filler._thread.is_alive()
    assert told == expected


@pytest.mark.parametrize(
    ("spare", "keep"),
    [(9 * SPARE_BYTES, 9 * SPARE_BYTES - GIVE_BYTES), (SPARE_BYTES + 1, SPARE_BYTES), (0, SPARE_BYTES)],
)
def test_memory_of_used_pads_is_given_back_bit_by_bit_once_the_pool_is_full_again(
    spare: int, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    pool, memory = Counts(), secret_memory()
    filler = filler_of(pool, {ONE: 2})

    def give_back(keep: int) -> None:
        assert pool.made  # not before: it is about to be used again
        kept.append(keep)
        filler._stop.set()

    monkeypatch.setattr(memory, "give_back", give_back)
    monkeypatch.setattr(memory, "spare_bytes", lambda: spare)
    monkeypatch.setattr(filler, "_is_idle", lambda: bool(pool.made))
    pool.recent[ONE] = time.monotonic(), 1  # an answer is under way, on its last block
    filler._run()
    assert kept == [keep]


def test_no_memory_is_given_back_while_a_pass_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass would wait for it."""
    filler = filler_of(Counts(), {})
    asked: list[float] = []

    def wait(seconds: float) -> bool:
        asked.append(seconds)
        filler._stop.set()
        return True

    monkeypatch.setattr(secret_memory(), "give_back", lambda keep: asked.append(-1))
    monkeypatch.setattr(filler._stop, "wait", wait)
    filler.busy = lambda: True
    filler._run()
    assert asked == [IDLE_S]
