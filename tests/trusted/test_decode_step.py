"""A step of few rows as one compiled loop has the bits of the plain way, counts what that counts, and serves what it
may.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.families import FAMILIES, random_tokens, tiny_model
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.scan import shared_pads
from tests.trusted.step_runs import (
    CALLS,
    PAD_ROWS,
    RecordingWorker,
    Taken,
    beside,
    caches,
    fill,
    held,
    opened,
    plain,
    same,
    step_of,
    stepped,
)
from tests.wire.shm_peers import taken_bytes
from tsqp import LLM, Limits, SamplingParams
from tsqp.api.config import ProtectionName
from tsqp.arith.row_threads import row_threads
from tsqp.errors import PadsExhausted
from tsqp.model import block_attention
from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache
from tsqp.trusted import decode_step, step_loops
from tsqp.trusted.engine.request import Output
from tsqp.trusted.guard.kernels import ERASED
from tsqp.trusted.guard.pool import PadPool, PadSlice
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.trace import Trace

SERVED = sorted(FAMILIES.keys() - {"qwen3"})  # which has norms of heads
KV_DTYPES = ("float32", "bfloat16")
ROWS = {1: [11], 2: [0, 15], 5: [1, 12, 16, 100, 250], 16: [*range(9, 19), 0, 31, 32, 63, 200, 251]}
EDGES = [255, 256, 1022, 1023, 0, 511, 2040]  # of 256 keys and of 1,024: three steps cross them


def assert_same_bits(llm: LLM, lengths: Sequence[int], taken: Taken, steps: int = 3) -> None:
    """Some steps of sequences of these lengths, both ways; the compiled way was really taken."""
    ours, theirs = caches(llm, lengths), caches(llm, lengths)
    for step in range(steps):
        before = taken.steps
        logits = stepped(llm, ours, step)
        assert taken.steps == before + 1
        with plain(llm):
            expected = stepped(llm, theirs, step)
        assert taken.steps == before + 1
        assert torch.isfinite(expected).all()
        assert torch.equal(logits, expected), f"step {step}"
    assert [cache.length for cache in ours] == [length + steps for length in lengths]
    assert same(held(llm, ours), held(llm, theirs))


@dataclass(frozen=True)
class Pass:
    """Rows of sequences of these lengths; those from ``first_steps`` on are decode steps."""

    lengths: Sequence[int]
    rows: Sequence[int]
    first_steps: Sequence[int]
    sampled: Sequence[bool]
    whole: Sequence[bool] | None = None
    every_row: bool = False

    def run(self, llm: LLM, sequences: Sequence[KVCache]) -> torch.Tensor:
        tokens = [random_tokens(count, seed) for seed, count in enumerate(self.rows)]
        wanted = self.every_row, self.sampled, self.first_steps, self.whole
        return llm.engine.run(Batch(tokens, sequences, *wanted)).clone()


PROMPTS = {
    "a part beside answers": Pass([11, 30, 3], [1, 1, 9], [5, 5, 99], [True, True, False]),
    "the end beside answers": Pass([11, 30, 3], [1, 1, 9], [5, 5, 12], [True, True, True]),
    "the beginning": Pass([11, 0], [1, 12], [5, 99], [True, False]),
    "as many rows as there may be": Pass([90, 11], [15, 1], [200, 5], [False, True]),
    "one row is none of an answer": Pass([30, 8], [1, 1], [5, 99], [True, False]),
    "a whole prompt alone": Pass([0], [7], [7], [True]),
    "two before an answer": Pass([0, 20, 9], [5, 3, 1], [50, 23, 2], [False, True, True]),
    "an answer computed again": Pass([0, 250], [1, 6], [0, 252], [True, True]),  # caches grow at 256
    "all of its logits": Pass([11, 3], [1, 5], [5, 99], [True, False], whole=[False, True]),
    "logits of all rows": Pass([11, 3], [1, 5], [5, 99], [True, False], every_row=True),
}


def assert_same_pass(llm: LLM, one: Pass, taken: Taken) -> None:
    """Both ways; the compiled way was really taken."""
    ours, theirs = caches(llm, one.lengths), caches(llm, one.lengths)
    before = taken.steps
    logits = one.run(llm, ours)
    assert taken.steps == before + 1
    with plain(llm):
        expected = one.run(llm, theirs)
    assert taken.steps == before + 1
    assert torch.isfinite(expected).all()
    assert torch.equal(logits, expected)
    assert [cache.length for cache in ours] == [sum(two) for two in zip(one.lengths, one.rows, strict=True)]
    assert same(held(llm, ours), held(llm, theirs))


# The same bits


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", SERVED)
def test_every_family(family: str, mode: ProtectionName, kv_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Taken(monkeypatch)
    with opened(mode, str(tiny_model(family).directory), kv_dtype=kv_dtype) as (llm, _):
        for lengths in ROWS.values():
            assert_same_bits(llm, lengths, taken)
        for one in (PROMPTS["the end beside answers"], PROMPTS["an answer computed again"]):
            assert_same_pass(llm, one, taken)


@pytest.fixture(scope="module", params=[(mode, kv_dtype) for mode in MODES for kv_dtype in KV_DTYPES], ids=str)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, RecordingWorker]]:
    """One session for many tests, of a model with room for 2,048 positions."""
    mode, kv_dtype = request.param
    with opened(mode, kv_dtype=kv_dtype) as (llm, worker):
        yield llm, worker


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


Run = tuple[LLM, RecordingWorker]


@pytest.mark.parametrize("lengths", [[255], [1023], EDGES], ids=str)
def test_across_the_edges_of_keys(run: Run, lengths: list[int], taken: Taken) -> None:
    assert_same_bits(run[0], lengths, taken)


def test_the_last_position_of_the_context(run: Run, taken: Taken) -> None:
    last = run[0].config.max_positions - 1
    assert_same_bits(run[0], [last, 3], taken, steps=1)


def test_a_prompt_of_one_token(run: Run, taken: Taken) -> None:
    assert_same_bits(run[0], [0], taken, steps=2)


@pytest.mark.parametrize("name", PROMPTS)
def test_rows_of_prompts(run: Run, name: str, taken: Taken) -> None:
    assert_same_pass(run[0], PROMPTS[name], taken)


@pytest.mark.parametrize("position", [505, 1015, 2035])
def test_rows_of_prompts_across_the_edges_of_keys(run: Run, position: int, taken: Taken) -> None:
    """Of 512 keys, and of 6 queries."""
    assert_same_pass(run[0], Pass([40, position], [1, 13], [5, 2048], [True, False]), taken)


@given(data=st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prompt_in_any_parts_beside_an_answer(run: Run, data: st.DataObject) -> None:
    """Its keys, its values and its logits are those of the whole prompt in one pass, the plain way."""
    llm, _ = run
    prompt, answer = random_tokens(40), random_tokens(40, seed=1)
    whole, parts, beside_it = (llm.engine.decoder.new_cache() for _ in range(3))
    with plain(llm):
        expected = llm.engine.run(Batch([prompt], [whole], first_steps=[40])).clone()
    at = 0
    while at < 40:
        rows = min(data.draw(st.integers(1, 15)), 40 - at)
        tokens, last = [[answer[at]], prompt[at : at + rows]], at + rows == 40
        logits = llm.engine.run(Batch(tokens, [beside_it, parts], sampled=[True, last], first_steps=[0, 40])).clone()
        at += rows
    assert torch.equal(logits[1:], expected)
    assert same(held(llm, [parts]), held(llm, [whole]))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of this side."""
    torch.set_num_threads(request.param)
    row_threads.cache_clear()
    try:
        yield request.param
    finally:
        torch.set_num_threads(1)
        row_threads.cache_clear()


def test_attention_that_threads_share(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one long sequence the threads share keys, in Python; of many sequences they share rows."""
    monkeypatch.setattr(decode_step, "SPLIT_PAIRS", 1)
    monkeypatch.setattr(block_attention, "SPLIT_PAIRS", 1)
    with opened("masked", threads=threads) as (llm, _):
        assert row_threads().threads == threads
        for lengths in (EDGES[:1], EDGES):
            taken = Taken(monkeypatch)
            assert_same_bits(llm, lengths, taken)
            by_keys = [step_loops.ATTEND] * llm.config.num_layers if len(lengths) < 2 * threads else []
            assert taken.own == [*by_keys, step_loops.OVER] * 3
        for one in PROMPTS.values():  # whose KV heads they share, in Python where there are too few
            assert_same_pass(llm, one, taken)


def test_rows_that_threads_share(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes a row computes the same. The threads end with the run."""
    others = set(threading.enumerate())
    monkeypatch.setattr(decode_step, "SHARE_NUMBERS", 1)
    with opened("masked", threads=threads) as (llm, _):
        taken = Taken(monkeypatch)
        for lengths in ROWS.values():
            assert_same_bits(llm, lengths, taken)
        for one in PROMPTS.values():
            assert_same_pass(llm, one, taken)
        own = [one for one in set(threading.enumerate()) - others if one.name.startswith("tsqp-step")]
        assert len(own) == threads - 1
    for thread in own:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("lengths", [[0], [40]], ids=str)
def test_from_how_many_pairs_on_threads_share_it(
    run: Run, lengths: list[int], taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = run
    pairs = llm.config.num_heads * sum(length + 1 for length in lengths)
    for least, shared in ((pairs + 1, 0), (pairs, llm.config.num_layers)):
        monkeypatch.setattr(decode_step, "SPLIT_PAIRS", least)
        before = taken.why.count(step_loops.ATTEND)
        assert_same_bits(llm, lengths, taken, steps=1)
        assert taken.why.count(step_loops.ATTEND) == before + shared


@pytest.mark.parametrize("least", [4 * 12, 4 * 12 + 1])
def test_pairs_that_a_window_hides_are_not_counted(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with a window of 12 on its second layer only."""
    monkeypatch.setattr(decode_step, "SPLIT_PAIRS", least)
    with opened("verified", str(tiny_model("qwen2-window").directory)) as (llm, _):
        assert llm.config.windows == (None, 12)
        taken = Taken(monkeypatch)
        assert_same_bits(llm, [100], taken, steps=1)
    assert taken.why.count(step_loops.ATTEND) == (2 if least == 4 * 12 else 1)


def test_a_count_of_rows_that_changes_from_step_to_step(run: Run, taken: Taken) -> None:
    """As sequences end, and others begin: plans are made anew, and pads of two blocks are one call's."""
    llm, _ = run
    for rows in (1, 16, 2, 15, 1, 5, 5, 3, 16, 1):
        assert_same_bits(llm, [*range(7, 7 + rows)], taken, steps=2)


def test_plans_that_are_let_go_give_their_memory_back(run: Run) -> None:
    llm, _ = run
    assert isinstance(llm.session, WorkerSession)
    held_bytes = []
    for _ in range(2):
        for rows in range(1, 17):
            stepped(llm, caches(llm, [3] * rows))
        held_bytes.append(taken_bytes(llm.session.channel))
    assert held_bytes[0] == held_bytes[1]


def test_steps_between_prefills(run: Run, taken: Taken) -> None:
    """Both ways share a session: numbers, ids, pads."""
    llm, _ = run
    prompt, more = random_tokens(21), random_tokens(6, seed=1)
    found = []
    for way in ("compiled", "plain", "in turns"):
        cache: KVCache = llm.engine.decoder.new_cache()
        llm.engine.run(Batch([prompt], [cache]))
        for number, token in enumerate(more):
            batch = Batch([[token]], [cache])
            if way == "compiled" or (way == "in turns" and number % 2):
                found.append(llm.engine.run(batch).clone())
            else:
                with plain(llm):
                    found.append(llm.engine.run(batch).clone())
    steps = len(more)
    assert taken.steps == steps + steps // 2
    assert same(found[:steps], found[steps : 2 * steps])
    assert same(found[:steps], found[2 * steps :])


def test_every_row_of_a_step_is_its_last(run: Run) -> None:
    llm, _ = run
    tokens = [[token] for token in random_tokens(3)]
    one, other = (llm.engine.run(Batch(tokens, caches(llm, [4, 9, 2]), every_row=every)) for every in (True, False))
    assert torch.equal(one, other)


def test_answers_of_a_whole_run(run: Run, taken: Taken) -> None:
    llm, _ = run
    prompts, params = [random_tokens(9, seed=seed) for seed in range(3)], SamplingParams(max_tokens=8, ignore_eos=True)
    ours = llm.generate(prompts, params)
    assert taken.steps == 7
    with plain(llm):
        assert llm.generate(prompts, params) == ours
    assert taken.steps == 7


def test_prompts_that_arrive_beside_answers(run: Run, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = run
    monkeypatch.setattr(llm.engine._books.scheduler, "_limits", Limits(prefill_rows=7))
    prompts, params = [random_tokens(n, seed=n) for n in (20, 45, 3)], SamplingParams(max_tokens=12, ignore_eos=True)
    with plain(llm):
        alone = [[output.token for _, output in llm.engine.generate([prompt], params)] for prompt in prompts]
    found: list[list[Output]] = [[] for _ in prompts]
    for prompt, outputs in zip(prompts, found, strict=True):
        llm.engine.add_request(prompt, params, deliver=outputs.append)
        llm.engine.step()
    steps = len(prompts)
    while llm.engine.has_work():
        llm.engine.step()
        steps += 1
    assert [[output.token for output in outputs] for outputs in found] == alone
    assert taken.steps == steps - 1, "all but the first prompt alone"


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_compiled_after_a_model_is_open(mode: ProtectionName, kv_dtype: Any) -> None:
    with opened(mode, kv_dtype=kv_dtype) as (llm, _):
        compiled: Any = step_loops.decode
        before = len(compiled.signatures)
        for rows in (1, 5, 16):
            stepped(llm, caches(llm, [rows] * rows))
        beside(llm, caches(llm, [5, 6]), [1, 7])
        assert len(compiled.signatures) == before


# What it serves


def is_taken(llm: LLM, taken: Taken, batch: Batch[Any]) -> bool:
    before = taken.steps
    llm.engine.run(batch)
    return taken.steps > before


def test_it_takes_a_few_rows_of_which_some_have_logits(run: Run, taken: Taken) -> None:
    llm, _ = run
    assert is_taken(llm, taken, Batch([[1]] * 16, caches(llm, [4] * 16)))
    assert not is_taken(llm, taken, Batch([[1]] * 17, caches(llm, [4] * 17)))
    assert is_taken(llm, taken, Batch([[1] * 16], caches(llm, [4])))
    assert not is_taken(llm, taken, Batch([[1], [2] * 16], caches(llm, [4, 4])))
    assert not is_taken(llm, taken, Batch([[1, 2]], caches(llm, [4]), sampled=[False]))


def test_it_takes_no_more_rows_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("verified", prefill_chunk=2) as (llm, _):
        taken = Taken(monkeypatch)
        assert is_taken(llm, taken, Batch([[1]] * 2, caches(llm, [4] * 2)))
        assert not is_taken(llm, taken, Batch([[1]] * 3, caches(llm, [4] * 3)))


def test_whoever_wants_to_see_every_call_sees_it(run: Run, taken: Taken) -> None:
    llm, _ = run
    trace = llm.stats.trace = Trace()
    try:
        assert not is_taken(llm, taken, Batch([[1]], caches(llm, [4])))
    finally:
        llm.stats.trace = None
    assert sum(span.track == "call" for span in trace.spans) == CALLS
    assert is_taken(llm, taken, Batch([[1]], caches(llm, [4])))


def test_norms_of_heads_go_the_plain_way() -> None:
    with opened("verified", str(tiny_model("qwen3").directory)) as (llm, _):
        assert llm.engine.decoder._step is None  # type: ignore[attr-defined]
        stepped(llm, caches(llm, [4]))


@pytest.mark.slow
def test_keys_and_values_of_8_bits_go_the_plain_way() -> None:
    with opened("verified", kv_dtype="int8") as (llm, _):
        assert llm.engine.decoder._step is None  # type: ignore[attr-defined]
        assert torch.isfinite(stepped(llm, caches(llm, [0]))).all()


# Pads


class Slices:
    """The slices of pads of every call from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_calls: list[list[PadSlice]] = []
        real = PadPool.take

        def take(pool: PadPool, key: Any, rows: int) -> list[PadSlice]:
            slices = real(pool, key, rows)
            self.of_calls.append(slices)
            return slices

        monkeypatch.setattr(PadPool, "take", take)


@pytest.mark.parametrize("ahead", [0, 64], ids=["made on the spot", "made ahead"])
@pytest.mark.parametrize("rows", [1, 5, 15, 16])
def test_pads_of_two_blocks_in_one_call(rows: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("masked", ahead=ahead) as (llm, worker):
        if ahead:
            fill(llm)
        slices, taken = Slices(monkeypatch), Taken(monkeypatch)
        stepped(llm, caches(llm, [2]))  # so that those of 16 rows straddle too
        assert_same_bits(llm, [*range(rows)], taken, steps=4)
        straddling = [len(one) for one in slices.of_calls if len(one) > 1]
        assert bool(straddling) == (rows > 1)
        assert not shared_pads(worker.rows(np.uint32))


def test_a_run_that_does_not_wait_for_pads_goes_on_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("masked", ahead=PAD_ROWS, refuse=True) as (llm, worker):
        fill(llm)
        taken, sequences = Taken(monkeypatch), caches(llm, [5] * 9)
        with plain(llm):
            expected = stepped(llm, caches(llm, [5] * 9))
        assert taken.steps == 0
        sent, lost = worker.products, list[Any]()
        real = PadPool.take

        def take(pool: PadPool, key: Any, rows: int) -> list[PadSlice]:
            if key == ("gate_up", 1):  # the sixth of the step: those before it have taken theirs
                raise PadsExhausted("none")
            slices = real(pool, key, rows)
            lost.extend(slices)
            return slices

        with monkeypatch.context() as patch:
            patch.setattr(PadPool, "take", take)
            with pytest.raises(PadsExhausted):
                stepped(llm, sequences[:2])
        assert worker.products == sent
        assert taken.steps == 0
        assert [cache.length for cache in sequences] == [5] * 9
        assert sum(one.rows for one in lost) == 2 * 6
        for one in lost:
            for secret in (one.block._pads, one.block._products):
                assert (secret[one.at :][: one.rows] == ERASED).all()
        with pytest.raises(PadsExhausted):
            stepped(llm, sequences)
        assert worker.products == sent
        fill(llm)
        assert torch.equal(stepped(llm, sequences), expected)
        assert taken.steps == 1
        assert not shared_pads(worker.rows(np.uint32))


def test_where_there_are_no_pads_their_addresses_are_memory_that_stays_as_it_is(run: Run) -> None:
    llm, _ = run
    stepped(llm, caches(llm, [5, 6]))
    plan = step_of(llm)._plans[2, 2]
    assert (plan._secrets != 0).all()
    if llm.plan.protection.name == "verified":
        assert (plan._secrets == plan._no_pads.ctypes.data).all()
        assert len(plan._no_pads) >= plan.calls[:, [step_loops.INNER, step_loops.OUTER]].max()
    assert not plan._no_pads.any()


# What is counted


@pytest.mark.parametrize("rows", [[1], [1, 1, 1], [1, 1, 5]], ids=str)
def test_it_counts_what_the_plain_way_counts(run: Run, rows: list[int], taken: Taken) -> None:
    llm, worker = run
    counted: list[dict[str, Any]] = []
    for way in ("compiled", "plain"):
        llm.stats.reset()
        assert llm.guard is not None
        checked, calls = llm.guard.linears.products_checked, len(worker.seen)
        used = getattr(llm.guard.linears.pads, "used", 0)
        if way == "compiled":
            beside(llm, caches(llm, [6] * len(rows)), rows)
        else:
            with plain(llm):
                beside(llm, caches(llm, [6] * len(rows)), rows)
        messages = sum(worker.controls[calls:]) + sum(len(payload) for _, payload in worker.seen[calls:])
        stats = llm.stats
        assert sum(row.bytes_sent for row in stats.calls.values()) == messages
        counted.append(
            {
                "calls": {kind: (row.count, row.bytes_received) for kind, row in stats.calls.items()},
                "products_checked": llm.guard.linears.products_checked - checked,
                "pads": getattr(llm.guard.linears.pads, "used", 0) - used,
                "passes": (stats.forward_passes, stats.chunks, stats.micro_batches),
                "operators": {name for name, seconds in stats.operator_s.items() if seconds > 0} - {"pads"},
                "calls took time": {kind for kind, row in stats.calls.items() if 0 < row.worker_s <= row.rpc_s},
                "held": {kind for kind, row in stats.calls.items() if row.held_s > 0},
            }
        )
    assert counted[0] == counted[1]
    assert counted[0]["calls"]["linear"][0] == CALLS - 1
    assert counted[0]["products_checked"] == CALLS
    assert taken.steps == 1


def test_ids_are_used_once_and_in_order(run: Run) -> None:
    llm, worker = run
    first = len(worker.seen)
    for number in range(4):
        if number % 2:
            stepped(llm, caches(llm, [6, 6]))
        else:
            with plain(llm):
                stepped(llm, caches(llm, [6, 6]))
    ids = [call.id for call, _ in worker.seen[first:]]
    assert ids == [*range(ids[0], ids[0] + 4 * CALLS)]
