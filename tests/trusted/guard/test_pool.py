"""The pool of pads: bounded, filled while nothing else is to be done, and never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import LIMIT_S
from tests.families import random_tokens, tiny_model
from tests.trusted.guard.fakes import HEAD, KEY, OTHER, Array, make_groups, make_pool, record_blocks, secrets_of
from tests.trusted.guard.honest import HonestConnection
from tests.trusted.guard.hostile import serve
from tsqp import LLM, SamplingParams
from tsqp.api.config import GuardConfig
from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import GroupKey, group_keys, linear_groups
from tsqp.errors import ChannelClosed, InputError, PadReused, PadsExhausted, ProductMismatch, TsqpError
from tsqp.trusted.filler import HEAD_ROWS, PadFiller, block_bytes, targets
from tsqp.trusted.guard.linears import MaskedLinears
from tsqp.trusted.guard.pads import PadBlock
from tsqp.trusted.guard.pool import NoPads, PadPool, pads_together, together
from tsqp.trusted.guard.sources import LocalPadSource
from tsqp.trusted.guard.weights import GuardedGroup

MODEL = str(tiny_model("llama").directory)
CONFIG = open_checkpoint(MODEL).config
BLOCKS: dict[GroupKey, int] = {KEY: 3, OTHER: 3, HEAD: 1}


class Source(LocalPadSource):
    """An honest source that counts blocks, and does first what the test says."""

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self.blocks = 0
        self._first = first

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        self._first()
        self.blocks += len(keys)
        return super().products(group, keys, pads)


def refuse(error: Exception) -> Callable[[], None]:
    def first() -> None:
        raise error

    return first


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a time that only a failure takes."""
    end = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@contextmanager
def filler_of(pool: PadPool, blocks: dict[GroupKey, int] = BLOCKS) -> Iterator[PadFiller]:
    with closing(pool), closing(PadFiller(pool, blocks)) as filler:
        yield filler


# How many


def bytes_of(blocks: dict[GroupKey, int]) -> int:
    groups = linear_groups(CONFIG)
    return sum(count * (16 * 4 * groups[key[0]].out_features + KEY_BYTES) for key, count in blocks.items())


@given(ahead=st.integers(0, 2000), memory=st.integers(0, 4_000_000))
def test_targets_fit_into_memory_and_are_the_most_that_does(ahead: int, memory: int) -> None:
    blocks = targets(CONFIG, ahead, memory)
    assert list(blocks) == group_keys(CONFIG)
    assert bytes_of(blocks) <= memory
    tokens = {count * BLOCK_ROWS for key, count in blocks.items() if key[1] is not None}
    assert len(tokens) == 1
    (ready,) = tokens
    assert ready < ahead + BLOCK_ROWS
    assert blocks[HEAD] * BLOCK_ROWS == min(ready, HEAD_ROWS)
    if ready < ahead:  # then one block more of each would not fit
        more = {
            key: -(-(min(ready + BLOCK_ROWS, HEAD_ROWS) if key == HEAD else ready + BLOCK_ROWS) // BLOCK_ROWS)
            for key in blocks
        }
        assert bytes_of(more) > memory


def memory_of(array: Any) -> int:
    """Bytes of the piece of memory that an array is a view of."""
    while isinstance(array, np.ndarray):
        array = array.base
    return memoryview(array).nbytes


def test_what_a_filled_pool_holds_is_what_was_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    made = record_blocks(monkeypatch)
    groups, _ = make_groups()
    with filler_of(make_pool(groups)) as filler:
        filler.fill()
        held = 0
        for block in made:
            assert block._pads is None  # only the key is kept of these
            assert block._products is not None
            assert memory_of(block._products) == block._products.nbytes  # not a view of something larger
            held += block._products.nbytes + len(block._key)
        assert held == sum(count * block_bytes(groups[key].out_features) for key, count in BLOCKS.items())
        assert len(made) == sum(BLOCKS.values())


def test_the_memory_of_a_run_is_bounded() -> None:
    options = GuardConfig(pads_ahead=1024, pad_memory=200_000)
    with serve(MODEL) as (_, address), LLM(MODEL, protection="masked", worker=address, guard=options) as llm:
        assert llm.guard is not None
        filler = llm.guard.filler
        assert filler is not None
        assert 0 < filler.ahead < 1024
        assert bytes_of(dict(filler.blocks)) <= 200_000
        assert eventually(lambda: filler.ready(answer=False) >= filler.ahead)
        assert llm.guard.report()["pads_ahead"] == filler.ahead


# Filling


def test_fill_tells_how_far_it_is() -> None:
    groups, _ = make_groups()
    seen: list[tuple[int, int]] = []
    blocks: dict[GroupKey, int] = {KEY: 40, OTHER: 20, HEAD: 5}
    with filler_of(make_pool(groups), blocks) as filler:
        filler.fill(lambda ready, target: seen.append((ready, target)))
        assert filler.ready(answer=False) == 20 * BLOCK_ROWS
        assert filler.ready(answer=True) == 5 * BLOCK_ROWS
        filler.fill(lambda ready, target: seen.append((-1, target)))  # there is nothing left to do
    assert [target for _, target in seen] == [65] * len(seen)
    assert [ready for ready, _ in seen] == sorted({ready for ready, _ in seen})
    assert seen[-1] == (65, 65)


def test_an_idle_pool_fills_itself_and_again_after_use() -> None:
    groups, _ = make_groups()
    pool = make_pool(groups)
    with filler_of(pool) as filler:
        filler.start()
        assert eventually(lambda: filler.ready(answer=False) == 3 * BLOCK_ROWS)
        pool.take(KEY, 2 * BLOCK_ROWS)
        assert pool.missed == 0
        assert eventually(lambda: pool.ready(KEY) == 3 * BLOCK_ROWS)
    assert pool.ready(KEY) == 0


def test_nothing_is_made_ahead_unless_asked_for() -> None:
    groups, _ = make_groups()
    source = Source()
    pool = make_pool(groups, source)
    with filler_of(pool, dict.fromkeys(BLOCKS, 0)) as filler:
        filler.fill()
        assert (filler.ahead, filler.ready(answer=True), source.blocks) == (0, 0, 0)


def test_close_joins_the_thread_and_destroys_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made = record_blocks(monkeypatch)
    groups, _ = make_groups()
    pool = make_pool(groups)
    filler = PadFiller(pool, BLOCKS)
    filler.start()
    assert eventually(lambda: pool.ready(KEY) > 0)
    pool.take(KEY, 5)[0].pads(groups[KEY].in_features)
    filler.close()
    assert not filler._thread.is_alive()
    pool.close()
    assert made
    assert not secrets_of(made)
    filler.close()
    pool.close()
    with pytest.raises(PadReused):
        pool.take(KEY, 1)
    with pytest.raises(PadReused):
        pool.make(KEY, 1)


def test_close_waits_for_what_is_being_made_and_destroys_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool goes while the thread is in the middle of a product."""
    made = record_blocks(monkeypatch)
    groups, _ = make_groups()
    inside, go_on = threading.Event(), threading.Event()

    def first() -> None:
        inside.set()
        assert go_on.wait(20)

    pool = make_pool(groups, Source(first))
    filler = PadFiller(pool, BLOCKS)
    filler.start()
    assert inside.wait(20)
    pool.close()
    go_on.set()
    filler.close()
    assert made
    assert not secrets_of(made)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ProductMismatch("the dealer cheats"), ProductMismatch),
        (RuntimeError("out of memory"), ChannelClosed),
        (MemoryError(), ChannelClosed),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_ends_the_filling_is_raised_by_the_next_call(error: Exception, expected: type[TsqpError]) -> None:
    groups, _ = make_groups()
    pool = make_pool(groups, Source(refuse(error)))
    with filler_of(pool) as filler:
        filler.start()
        filler._thread.join(20)
        for _ in range(2):
            with pytest.raises(expected):
                pool.take(KEY, 1)


# Taking


@pytest.mark.parametrize("rows", [1, 16, 17, 48, 49, 100])
def test_wait_makes_what_is_missing(rows: int) -> None:
    groups, weights = make_groups()
    source = Source()
    pool = make_pool(groups, source)
    with filler_of(pool) as filler:
        filler.fill()
        made = source.blocks
        slices = pool.take(KEY, rows)
        assert [(one.first, one.rows) for one in slices] == [
            (first, min(BLOCK_ROWS, rows - first)) for first in range(0, rows, BLOCK_ROWS)
        ]
        missing = max(0, rows - 48)
        assert (pool.used, pool.missed) == (rows, missing)
        assert source.blocks == made  # until it is asked for the products
        pads = [one.pads(groups[KEY].in_features).copy() for one in slices]
        pool.supply(KEY, slices)
        assert source.blocks == made + -(-missing // BLOCK_ROWS)
        for pad, one in zip(pads, slices, strict=True):
            exact = pad.astype(np.int64) @ weights[KEY].numpy().astype(np.int64).T % (2**31 - 1)
            assert (one.products() == exact).all()


@given(st.integers(0, 40), st.integers(1, 300), st.integers(2, 100))
def test_slices_that_are_masked_together_are_whole_blocks_and_have_their_pads_in_one_memory(
    used: int, rows: int, most: int
) -> None:
    groups, _ = make_groups()
    pool = make_pool(groups)
    if used:
        pool.take(KEY, used)
    slices = pool.take(KEY, rows)
    parts = together(slices, most)
    assert [one for part in parts for one in part] == slices
    width, first = groups[KEY].in_features, 0
    for part in parts:
        assert len(part) == 1 or {one.rows for one in part} == {BLOCK_ROWS}
        assert sum(one.rows for one in part) < most + BLOCK_ROWS
        pads = pads_together(part, width)
        assert pads.shape == (sum(one.rows for one in part), width)
        assert part[0].first == first
        for one in part:
            assert one.block is not None
            assert np.array_equal(pads[one.first - first :][: one.rows], one.pads(width))
            assert np.array_equal(one.pads(width), PadBlock(one.block.key()).pads(one.at, one.rows, width))
        first += len(pads)
    assert first == rows


def test_rows_without_pads_are_given_none_whatever_is_together() -> None:
    groups, _ = make_groups()
    (part,) = together(NoPads().take(KEY, 4 * BLOCK_ROWS), 1000)
    assert pads_together(part, groups[KEY].in_features).shape[1] == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12))
def test_what_is_ready_is_what_can_be_taken_without_a_product(steps: list[tuple[bool, int]]) -> None:
    groups, _ = make_groups()
    with closing(make_pool(groups)) as pool:
        ready = 0
        for make, count in steps:
            if make:
                pool.make(KEY, count % 2 + 1)
                ready += (count % 2 + 1) * BLOCK_ROWS
            else:
                missed, taken = pool.missed, pool.take(KEY, count)
                assert pool.missed - missed == max(0, count - ready)
                pool.supply(KEY, taken)
                # What is left of the last block that a call has made is there for the next one.
                ready = ready - count if count <= ready else -(count - ready) % BLOCK_ROWS
            assert pool.ready(KEY) == ready


def test_a_call_never_waits_for_the_thread() -> None:
    """Which is stuck in a product here, while calls go on."""
    groups, weights = make_groups()
    inside, go_on = threading.Event(), threading.Event()
    main = threading.current_thread()

    def first() -> None:
        if threading.current_thread() is not main:
            inside.set()
            assert go_on.wait(20)

    pool = make_pool(groups, Source(first))
    with filler_of(pool) as filler:
        filler.start()
        assert inside.wait(20)
        linears = MaskedLinears(HonestConnection(weights), groups, pool)
        for _ in range(3):
            assert linears.start(KEY, torch.randn(20, 40)).wait().shape == (20, 24)
        go_on.set()


def test_refuse_raises_before_anything_is_sent_and_the_session_goes_on() -> None:
    groups, weights = make_groups()
    pool = make_pool(groups, wait=False)
    line = HonestConnection(weights)
    linears = MaskedLinears(line, groups, pool)
    with filler_of(pool) as filler:
        with pytest.raises(PadsExhausted, match="5 of 5"):
            linears.start(KEY, torch.randn(5, 40))
        filler.fill()
        with pytest.raises(PadsExhausted, match="2 of 50"):
            linears.start(KEY, torch.randn(50, 40))
        assert not line.sent
        assert pool.ready(KEY) == 48  # none was lost
        assert linears.start(KEY, torch.randn(48, 40)).wait().shape == (48, 24)
        with pytest.raises(PadsExhausted):
            linears.start(KEY, torch.randn(1, 40))
        filler.fill()
        assert linears.start(KEY, torch.randn(1, 40)).wait().shape == (1, 24)
    assert len(line.sent) == 2
    assert pool.missed == 0


def test_refuse_in_a_run() -> None:
    options = GuardConfig(pads_ahead=32, pads_empty="refuse")
    with serve(MODEL) as (worker, address), LLM(MODEL, protection="masked", worker=address, guard=options) as llm:
        assert llm.guard is not None
        filler = llm.guard.filler
        assert filler is not None
        filler.fill()
        with pytest.raises(InputError, match="kept for 32 tokens"):
            llm.generate(random_tokens(200), SamplingParams(max_tokens=1))
        assert worker.products == 0
        first = llm.generate(random_tokens(20), SamplingParams(max_tokens=1))[0]
        filler.fill()
        assert llm.generate(random_tokens(20), SamplingParams(max_tokens=1))[0] == first


def test_many_threads_never_get_the_same_row() -> None:
    groups, _ = make_groups()
    pool = make_pool(groups)
    taken: list[list[tuple[PadBlock, int]]] = [[] for _ in range(8)]
    begin = threading.Barrier(9)

    def work(index: int) -> None:
        generator = np.random.default_rng(index)
        begin.wait()
        for _ in range(150):
            rows = int(generator.integers(1, 40))
            slices = pool.take(KEY, rows)
            assert sum(one.rows for one in slices) == rows
            for one in slices:
                assert one.block is not None
                taken[index] += [(one.block, one.at + row) for row in range(one.rows)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    with filler_of(pool) as filler:
        filler.start()
        for thread in threads:
            thread.start()
        begin.wait()
        for thread in threads:
            thread.join()
    rows = [(id(block), row) for part in taken for block, row in part]
    assert len(rows) == len(set(rows)) == pool.used


def test_many_threads_with_products_get_right_ones() -> None:
    """Calls of several threads on one pool, each checked against the plain product.

    Their pads are ready: what is missing is made by one run at a time, and two would both make the block they share.
    """
    groups, weights = make_groups()
    pool = make_pool(groups)
    pool.make(KEY, 4 * 20 * 30 // BLOCK_ROWS)
    failures: list[Any] = []

    def work(seed: int) -> None:
        line = HonestConnection(weights)
        linears = MaskedLinears(line, groups, pool)
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(20):
                x = torch.randn(int(torch.randint(1, 30, (1,), generator=generator)), 40, generator=generator)
                y = linears.start(KEY, x).wait()
                plain = x @ (weights[KEY].float() * torch.from_numpy(groups[KEY].scales)[:, None]).T
                error = (y - torch.from_numpy(groups[KEY].bias) - plain).norm() / plain.norm()
                assert error < 0.01
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not pool.missed
