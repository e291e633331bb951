"""Adapters: the numbers of merged weights, for each row those of its own adapter, in the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters import SEVEN, eight_bit_model, merged, write_adapter
from tests.conftest import StartWorker
from tests.families import TinyModel, random_tokens, tiny_model
from tests.session_directory import session_directory
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import serve
from tests.trusted.step_runs import Taken, caches, held, opened, plain, same
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName, ProtectionName
from tsqp.arith.row_threads import row_threads
from tsqp.model import adapter_loops, adapters
from tsqp.model.batch import Batch
from tsqp.trusted import decode_step
from tsqp.trusted.engine.caller import Caller
from tsqp.trusted.engine.engine import Engine

LLAMA = tiny_model("llama")
KINDS: dict[str, dict[str, Any]] = {  # of adapters, which differ in all that may differ
    "all": {"rank": 4},
    "wide": {"rank": 16, "seed": 1, "use_rslora": True},
    "some": {"rank": 3, "seed": 2, "targets": ("q_proj", "v_proj", "up_proj"), "ranks": {"v_proj": 7}},
    "one-layer": {"rank": 5, "seed": 3, "targets": ("down_proj", "k_proj"), "layers": [1]},
}
ROWS: list[str | None] = [None, *KINDS]
TOLERANCE = 1e-4


def saved(name: str, model: TinyModel = LLAMA, **more: Any) -> Path:
    """One of the adapters, saved for a model."""
    directory = session_directory() / "adapters" / model.directory.name / name
    return directory if directory.exists() else write_adapter(directory, model, **KINDS.get(name, {}), **more)


LORA = tuple(str(saved(name)) for name in KINDS)


def relative_error(llm: LLM, oracle: TinyModel, tokens: list[int], lora: str) -> float:
    expected = oracle.logits(tokens)
    return float((llm.logits(tokens, lora=lora) - expected).norm() / expected.norm())


# What is computed


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_model_with_merged_weights(name: str) -> None:
    oracle = merged(LLAMA, saved(name))
    tokens = random_tokens(50)
    compute = ComputeConfig(dtype="float32", lora=LORA)
    with LLM(str(LLAMA.directory), protection="local", compute=compute) as llm:
        plain_logits = llm.logits(tokens)
        assert float((plain_logits - LLAMA.logits(tokens)).norm() / plain_logits.norm()) <= TOLERANCE
        assert float((plain_logits - oracle.logits(tokens)).norm() / plain_logits.norm()) > 0.02  # it changes something
        assert relative_error(llm, oracle, tokens, name) <= TOLERANCE
        answer = llm.generate(tokens, SamplingParams(max_tokens=12), lora=name)[0]
        assert list(answer.token_ids) == oracle.greedy(tokens, 12)


@pytest.mark.parametrize("family", ["helium", "phi3-longrope", "granite", "olmo2", "arcee", "qwen3", "qwen2"])
def test_families_that_store_or_compute_otherwise(family: str) -> None:
    model = tiny_model(family)
    targets: tuple[str, ...] = {"phi3-longrope": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}.get(family, SEVEN)
    targets = tuple(name for name in targets if family != "arcee" or name != "gate_proj")
    directory = saved("family", model, targets=targets)
    compute = ComputeConfig(dtype="float32", lora=(str(directory),))
    with LLM(str(model.directory), protection="local", compute=compute) as llm:
        assert relative_error(llm, merged(model, directory), random_tokens(50), "family") <= TOLERANCE


@pytest.mark.parametrize("partition", ["op", "batched", "linear"])
@pytest.mark.parametrize("transport", ["shm", "ipc"])
def test_in_every_partition_that_leaves_layers_here(
    partition: PartitionName, transport: str, start_worker: StartWorker
) -> None:
    oracle = merged(LLAMA, saved("all"))
    compute = ComputeConfig(partition=partition, dtype="float32", lora=LORA, prefill_chunk=19, micro_batches=2)
    address = start_worker(LLAMA.directory, transport)
    with LLM(str(LLAMA.directory), protection="open", worker=address, compute=compute) as llm:
        assert relative_error(llm, oracle, random_tokens(50), "all") <= TOLERANCE
        answer = llm.generate(random_tokens(50), SamplingParams(max_tokens=12), lora="all")[0]
        assert list(answer.token_ids) == oracle.greedy(random_tokens(50), 12)


@pytest.mark.parametrize("mode", MODES)
def test_in_private_modes(mode: ProtectionName) -> None:
    """Of a model whose weights have 8 bits already, since those of private modes have."""
    model, tokens = eight_bit_model(), random_tokens(50)
    lora = tuple(str(saved(name, model)) for name in KINDS)
    with (
        serve(model.directory) as (_, address),
        LLM(str(model.directory), protection=mode, worker=address, compute=ComputeConfig(lora=lora)) as llm,
    ):
        for name in KINDS:
            assert relative_error(llm, merged(model, saved(name, model)), tokens, name) <= TOLERANCE


# The same bits


PROMPTS = [random_tokens(count, seed=count) for count in (9, 37, 1, 20)]


def pass_by_pass(engine: Engine, chosen: Sequence[tuple[int, str | None]]) -> list[torch.Tensor]:
    """Logits of every row of some prompts with adapters and of three decode steps after them: (T, vocab) for each."""
    sequences = [engine.decoder.new_cache() for _ in chosen]
    found: list[list[torch.Tensor]] = [[] for _ in chosen]
    for step in range(4):
        tokens = [PROMPTS[index] if step == 0 else [100 + step + index] for index, _ in chosen]
        batch = Batch(tokens, sequences, every_row=True, adapters=[name for _, name in chosen])
        for own, new in zip(found, engine.run(batch).split([len(one) for one in tokens]), strict=True):
            own.append(new.clone())
    return [torch.cat(own) for own in found]


EVERY = [(index, name) for index in range(len(PROMPTS)) for name in ROWS]


def private(mode: ProtectionName, address: str, **compute: Any) -> LLM:
    return LLM(str(LLAMA.directory), protection=mode, worker=address, compute=ComputeConfig(lora=LORA, **compute))


@pytest.fixture(scope="module", params=MODES)
def alone(request: pytest.FixtureRequest) -> tuple[ProtectionName, list[torch.Tensor]]:
    """The mode, and logits of each prompt with each adapter and with none, by itself."""
    with serve(LLAMA.directory) as (_, address), private(request.param, address) as llm:
        return request.param, [pass_by_pass(llm.engine, [one])[0] for one in EVERY]


@pytest.mark.parametrize(("chunk", "parts", "threads"), [(2048, 1, 1), (7, 1, 1), (2048, 3, 1), (2048, 1, 2)])
def test_alone_and_in_any_company(
    alone: tuple[ProtectionName, list[torch.Tensor]],
    chunk: int,
    parts: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mode, expected = alone
    monkeypatch.setattr(adapters, "SHARE_NUMBERS", 1)
    torch.set_num_threads(threads)
    row_threads.cache_clear()
    try:
        with (
            serve(LLAMA.directory) as (_, address),
            private(mode, address, prefill_chunk=chunk, micro_batches=parts) as llm,
        ):
            together = pass_by_pass(llm.engine, EVERY)
    finally:
        torch.set_num_threads(1)
        row_threads.cache_clear()
    for one, ours, theirs in zip(EVERY, together, expected, strict=True):
        assert torch.equal(ours, theirs), one
    assert len({tuple(one[-1].tolist()) for one in expected}) == len(EVERY)  # no two are the same


@pytest.mark.parametrize("mode", MODES)
def test_sixteen_requests_with_four_adapters_are_each_alone(mode: ProtectionName) -> None:
    prompts = [random_tokens(5 + 3 * number, seed=number) for number in range(16)]
    names = [ROWS[1:][number % 4] for number in range(16)]
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=7, logprobs=3)
    with serve(LLAMA.directory) as (_, address), private(mode, address) as llm:
        by_itself = [llm.generate(one, params, lora=name)[0] for one, name in zip(prompts, names, strict=True)]
        samplers = llm.new_answers(prompts, params)
        outputs: dict[int, list[int | None]] = {}
        with Caller(llm.engine) as caller:
            for one, name, (_, sampler) in zip(prompts, names, samplers, strict=True):
                caller.add(one, params, sampler=sampler, adapter=name)
            for place, output in caller:
                outputs.setdefault(place, []).append(output.token)
        for place, answer in enumerate(by_itself):
            assert outputs[place] == list(answer.token_ids)
            assert answer.logprobs is not None
            assert samplers[place][1].logprobs == list(answer.logprobs)


@pytest.fixture(scope="module", params=MODES)
def run(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with opened(request.param, str(LLAMA.directory), lora=LORA) as (llm, _):
        yield llm


@pytest.mark.parametrize("names", [[None], ["all"], ROWS, ["some", None, "some"]], ids=str)
def test_the_compiled_step_has_the_bits_of_the_plain_way(
    run: LLM, names: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(monkeypatch)
    lengths = [11 + 30 * number for number in range(len(names))]
    ours, theirs = caches(run, lengths), caches(run, lengths)
    for step in range(3):
        tokens = [[100 + step + number] for number in range(len(names))]
        before = taken.steps
        logits = run.engine.run(Batch(tokens, ours, adapters=names)).clone()
        assert taken.steps == before + 1
        with plain(run):
            expected = run.engine.run(Batch(tokens, theirs, adapters=names)).clone()
        assert taken.steps == before + 1
        assert torch.equal(logits, expected)
    assert same(held(run, ours), held(run, theirs))


def test_the_compiled_step_takes_a_prompt_beside_answers(run: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, names = Taken(monkeypatch), ["wide", "all", None]
    ours, theirs = caches(run, [11, 3, 30]), caches(run, [11, 3, 30])
    batch = [[5], random_tokens(9), [6]]
    more: dict[str, Any] = {"first_steps": [5, 99, 5], "adapters": names}
    logits = run.engine.run(Batch(batch, ours, **more)).clone()
    assert taken.steps == 1
    with plain(run):
        assert torch.equal(logits, run.engine.run(Batch(batch, theirs, **more)))


def test_threads_share_the_rows_of_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes a row adds what its own adapter adds."""
    monkeypatch.setattr(decode_step, "SHARE_NUMBERS", 1)
    torch.set_num_threads(3)
    row_threads.cache_clear()
    try:
        with opened("masked", str(LLAMA.directory), lora=LORA, threads=3) as (llm, _):
            taken, lengths = Taken(monkeypatch), [11 + 30 * number for number in range(len(ROWS))]
            ours, theirs = caches(llm, lengths), caches(llm, lengths)
            for step in range(5):
                tokens = [[100 + step + number] for number in range(len(ROWS))]
                logits = llm.engine.run(Batch(tokens, ours, adapters=ROWS)).clone()
                assert taken.steps == step + 1
                with plain(llm):
                    assert torch.equal(logits, llm.engine.run(Batch(tokens, theirs, adapters=ROWS)))
    finally:
        torch.set_num_threads(1)
        row_threads.cache_clear()


def test_time_of_adapters_is_told_both_ways(run: LLM) -> None:
    for way in ("compiled", "plain"):
        run.stats.reset()
        run.engine.run(Batch([[5]], caches(run, [9]), adapters=[None]))
        assert "lora" not in run.stats.operator_s
        if way == "plain":
            with plain(run):
                run.engine.run(Batch([[5]], caches(run, [9]), adapters=["all"]))
        else:
            run.engine.run(Batch([[5]], caches(run, [9]), adapters=["all"]))
        assert run.stats.operator_s["lora"] > 0
        run.stats.reset()


def test_a_conversation_is_kept_for_its_own_adapter(run: LLM) -> None:
    """Another adapter with the same tokens finds nothing; the same one does."""
    tokens, params = random_tokens(40), SamplingParams(max_tokens=3, ignore_eos=True)

    def ask(name: str | None, salt: str | None) -> tuple[list[int | None], int]:
        found = run.engine.counts().found_tokens
        with Caller(run.engine) as caller:
            caller.add(tokens, params, salt=salt, adapter=name)
            answer = [output.token for _, output in caller]
        return answer, run.engine.counts().found_tokens - found

    apart = {name: ask(name, None)[0] for name in ROWS}
    for name in ROWS:
        assert ask(name, "conversation") == (apart[name], 0)
    for name in ROWS:
        answer, found = ask(name, "conversation")
        assert answer == apart[name]
        assert found > 0


# The loop


@given(
    inner=st.integers(1, 40),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    of_row=st.lists(st.integers(-1, 1), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_loop_is_its_formula(inner: int, widths: list[int], ranks: list[int], of_row: list[int], seed: int) -> None:
    """Terms of integers, so that every order of them has the same sum."""
    generator = np.random.default_rng(seed)

    def whole(*shape: int) -> Any:
        return generator.integers(-8, 9, shape).astype(np.float32)

    table = np.zeros((2, adapter_loops.ADAPTER_NUMBERS), np.int64)
    x, y = whole(len(of_row), inner), whole(len(of_row), sum(widths))
    expected, kept = y.copy(), []
    for which in (0, 1):
        a = whole(inner, sum(ranks[: len(widths)]))
        kept.append(a)
        table[which, : adapter_loops.PARTS] = a.ctypes.data, a.shape[1]
        lane = column = 0
        for number, (rank, width) in enumerate(zip(ranks, widths, strict=False)):
            b = whole(rank, width)
            kept.append(b)
            at = adapter_loops.PARTS + number * adapter_loops.PART_NUMBERS
            table[which, at : at + adapter_loops.PART_NUMBERS] = lane, rank, column, width, b.ctypes.data
            for row, own in enumerate(of_row):
                if own == which:
                    expected[row, column : column + width] += x[row] @ a[:, lane : lane + rank] @ b
            lane, column = lane + rank, column + width
    adapter_loops.add_low_rank(x, y, np.array(of_row), table, 0, len(of_row))
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_row_has_the_same_bits_beside_any_others(rows: int) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((67, 16), (16, 51)))
    table = np.zeros((1, adapter_loops.ADAPTER_NUMBERS), np.int64)
    table[0, :7] = a.ctypes.data, 16, 0, 16, 0, 51, b.ctypes.data
    x, y = (generator.standard_normal((rows, width)).astype(np.float32) for width in (67, 51))
    together, of_row = y.copy(), np.zeros(rows, np.int64)
    adapter_loops.add_low_rank(x, together, of_row, table, 0, rows)
    for row in range(rows):
        own = y[row : row + 1].copy()
        adapter_loops.add_low_rank(x[row : row + 1].copy(), own, of_row[:1], table, 0, 1)
        assert np.array_equal(own[0], together[row])
