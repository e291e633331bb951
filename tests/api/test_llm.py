"""The Python API."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import LIMIT_S, children, wait_gone, wait_until
from tests.conftest import StartWorker
from tests.families import byte_tokenizer, random_tokens, tiny_model
from tsqp import LLM, Completion, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName, ProtectionName, RunConfig
from tsqp.api.links import SplitLinks
from tsqp.api.places import Dialled
from tsqp.api.plan import Plan
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint
from tsqp.config.dtype import DtypeName, KVDtype, PrivateKVDtype
from tsqp.config.partition import PARTITIONS
from tsqp.cores import cores
from tsqp.errors import (
    ChannelClosed,
    CheckpointNotFound,
    InputError,
    PromptError,
    TsqpError,
    WorkerLost,
    WorkerUnreachable,
)
from tsqp.model.batch import Batch
from tsqp.model.pending import Steps
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel
from tsqp.wire.transport import connect

MODEL = str(tiny_model("llama").directory)
TEXTS = ["The quick brown fox", "jumps"]


def expected(text: str, count: int) -> list[int]:
    return tiny_model("llama").greedy(byte_tokenizer().encode(text).ids, count)


def test_generate_answers_every_prompt_in_its_place() -> None:
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        completions = llm.generate(TEXTS, SamplingParams(max_tokens=8))
    assert [list(c.token_ids) for c in completions] == [expected(text, 8) for text in TEXTS]
    assert all(isinstance(c, Completion) and c.finish_reason == "length" for c in completions)
    assert [c.text for c in completions] == [byte_tokenizer().decode(expected(text, 8)) for text in TEXTS]


def test_one_prompt_may_be_text_or_tokens() -> None:
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        (by_text,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=4))
        (by_tokens,) = llm.generate(byte_tokenizer().encode(TEXTS[0]).ids, SamplingParams(max_tokens=4))
        assert by_text == by_tokens
        assert llm.generate([]) == []


@pytest.mark.parametrize("kind", [np.array, lambda ids: list(np.array(ids))], ids=["an array", "a list"])
def test_token_ids_may_be_integers_of_numpy(kind: Callable[[list[int]], Any]) -> None:
    prompts, params = [random_tokens(5), random_tokens(3)], SamplingParams(max_tokens=2)
    with LLM(MODEL, protection="local") as llm:
        expected = llm.generate(prompts, params)
        assert llm.generate([kind(prompt) for prompt in prompts], params) == expected
        assert llm.generate(kind(prompts[0]), params) == expected[:1]
        assert json.dumps(llm.encode(kind(prompts[0]))) == json.dumps(prompts[0])  # Python's own


def test_a_prompt_of_anything_else_is_refused_in_one_line() -> None:
    with LLM(MODEL, protection="local") as llm:
        for prompt in ([7.0], [[7, None]], ["a", 7.0], np.array([7.0]), [None]):
            with pytest.raises(PromptError, match=r"^a prompt is .* token ids, which are integers$"):
                llm.generate(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 10**9, 2**70])
def test_a_token_that_the_model_has_not_is_refused(token: int) -> None:
    with LLM(MODEL, protection="local") as llm:
        with pytest.raises(PromptError, match="vocabulary"):
            llm.generate([[1, token]])
        with pytest.raises(PromptError, match="vocabulary"):
            llm.logits([token])


@pytest.mark.parametrize("protection", ["local", "verified"])
def test_a_closed_model_answers_nothing_more(protection: ProtectionName) -> None:
    with LLM(MODEL, protection=protection) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=8))
        next(stream)
    for ask in (lambda: next(stream), lambda: llm.generate([[1]]), lambda: llm.logits([1])):
        with pytest.raises(ChannelClosed, match="closed"):
            ask()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_closing_from_another_thread_lets_a_pass_under_way_end(
    start_worker: StartWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line is not taken away under it: the thread hears that the model is closed, and nothing stranger."""
    with (
        LLM(MODEL, protection="verified", worker=start_worker(MODEL, transport, dtype="field")) as llm,
        ThreadPoolExecutor(1) as pool,
    ):
        decoder: Any = llm.engine.decoder
        forward, under_way, ended = decoder.forward, threading.Event(), list[bool]()

        def slow(batch: Batch[Any]) -> Steps[torch.Tensor]:
            under_way.set()
            wait_until(lambda: bool(llm.engine._one_at_a_time._waiting))  # whoever closes
            logits = yield from forward(batch)
            ended.append(True)
            return logits

        monkeypatch.setattr(decoder, "forward", slow)
        answer = pool.submit(llm.generate, [[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
        assert under_way.wait(LIMIT_S)
        llm.close()
        with pytest.raises(ChannelClosed, match="closed"):
            answer.result(LIMIT_S)
        assert ended == [True]


def test_closing_waits_no_longer_than_a_pass_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a worker that hangs."""
    monkeypatch.setattr("tsqp.api.open_model.LAST_PASS_S", 0.01)
    closed, under_way = threading.Event(), threading.Event()
    with LLM(MODEL, protection="local") as llm, ThreadPoolExecutor(1) as pool:

        def stuck() -> None:
            under_way.set()
            assert closed.wait(LIMIT_S)

        hangs = pool.submit(llm.engine.between_passes, stuck)
        assert under_way.wait(LIMIT_S)
        llm.close()
        assert llm.engine.busy()
        closed.set()
        hangs.result(LIMIT_S)


def test_a_model_may_be_a_path_and_workers_a_list(start_worker: StartWorker) -> None:
    compute = ComputeConfig(dtype="float32")
    with LLM(Path(MODEL), protection="open", worker=[start_worker(MODEL, "shm")], compute=compute) as llm:
        assert llm.generate([[1, 2]], SamplingParams(max_tokens=1))
    with pytest.raises(CheckpointNotFound, match="/no-such"):
        LLM(Path("/no-such"))


def test_stream_gives_the_same_text_in_pieces() -> None:
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        deltas = list(llm.stream(TEXTS[0], SamplingParams(max_tokens=12)))
        (whole,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=12))
    assert [delta.completion for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].completion == whole
    assert "".join(delta.text for delta in deltas) == whole.text


@pytest.mark.parametrize("protection", ["local", "open"])
def test_streams_may_take_turns(protection: ProtectionName, start_worker: StartWorker) -> None:
    worker = start_worker(MODEL) if protection == "open" else None
    params = SamplingParams(max_tokens=12)
    with LLM(MODEL, protection=protection, worker=worker, compute=ComputeConfig(dtype="float32")) as llm:
        expected = [llm.generate(text, params)[0] for text in TEXTS]
        short = SamplingParams(max_tokens=12, stop=(expected[0].text[3],))  # ends while the other goes on
        (stopped,) = llm.generate(TEXTS[0], short)
        together = list(zip_longest(llm.stream(TEXTS[0], short), llm.stream(TEXTS[1], params)))
    assert [delta.completion for delta, _ in together if delta is not None][-1] == stopped
    assert together[-1][1].completion == expected[1]


def test_a_stream_that_stops_leaves_the_others_alone() -> None:
    params = SamplingParams(max_tokens=12)
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        (whole,) = llm.generate(TEXTS[0], params)
        outer = llm.stream(TEXTS[0], params)
        next(outer)
        for _ in llm.stream(TEXTS[1], SamplingParams(max_tokens=3)):  # begins and ends in between
            pass
        assert list(outer)[-1].completion == whole


def test_end_tokens_and_stop_tokens_end_an_answer() -> None:
    tokens = expected(TEXTS[0], 12)
    stop = next(token for token in tokens if token != tokens[0])
    before = tokens[: tokens.index(stop)]
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        (completion,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=12, stop_token_ids=(stop,)))
    assert (list(completion.token_ids), completion.finish_reason) == (before, "stop")


def test_a_worker_lives_as_long_as_its_llm() -> None:
    with LLM(MODEL, protection="open", compute=ComputeConfig(threads=1)) as llm:
        worker = llm.worker_pid
        assert worker in children(os.getpid())
        llm.generate(TEXTS, SamplingParams(max_tokens=2))
        llm.close()
        assert worker not in children(os.getpid())
        with pytest.raises(ChannelClosed):
            llm.generate(TEXTS, SamplingParams(max_tokens=2))


def test_a_worker_that_ends_before_it_is_reached_is_named_with_its_end() -> None:
    def dial(address: str, **more: Any) -> Channel:
        (worker,) = [child for child in children(os.getpid()) if address in command_line(child)]
        os.kill(worker, signal.SIGKILL)
        wait_gone(worker)
        return connect(address, **more)

    with pytest.raises(WorkerLost, match=r"shm://.*: the worker that was started here went away: it was .* SIGKILL"):
        LLM(MODEL, protection="open", compute=ComputeConfig(threads=1), connect=dial)


def test_a_worker_that_lives_and_is_not_reached_is_not_said_to_have_gone() -> None:
    def unreachable(address: str, **more: Any) -> Channel:
        raise WorkerUnreachable(f"{address}: no worker answered in time")

    with pytest.raises(WorkerUnreachable, match="no worker answered in time"):
        LLM(MODEL, protection="open", compute=ComputeConfig(threads=1), connect=unreachable)


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def test_all_cores_when_no_count_of_threads_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    for threads in (None, 1):
        LLM(MODEL, protection="local", compute=ComputeConfig(threads=threads)).close()
    assert counts == [cores(), 1]


@pytest.mark.parametrize(
    ("protection", "stored", "asked", "kept"),
    [
        ("masked", "bfloat16", None, "bfloat16"),
        ("masked", "float16", None, "bfloat16"),
        ("verified", "float32", None, "float32"),  # a small model, whose near ties bfloat16 would decide otherwise
        ("masked", "float32", "bfloat16", "bfloat16"),
        ("masked", "bfloat16", "float32", "float32"),
        ("masked", "float32", "int8", "int8"),
        ("open", "float32", None, "float32"),
        ("open", "float16", None, "float16"),
    ],
)
def test_keys_and_values_are_kept_as_weights_are_stored(
    protection: ProtectionName, stored: DtypeName, asked: PrivateKVDtype | None, kept: KVDtype
) -> None:
    assert Plan.of(RunConfig(MODEL, protection, compute=ComputeConfig(kv_dtype=asked)), stored).kv_dtype == kept


def test_masked_is_the_default() -> None:
    asked: list[Plan] = []
    with pytest.raises(CheckpointNotFound):
        LLM("/nowhere", announce=asked.append)
    assert asked[0].protection.name == "masked"


@pytest.mark.parametrize("prompts", ["", "  ", [[]], ["fine", ""], [[100_000]], [random_tokens(300)]])
def test_bad_prompts_are_refused_before_anything_is_sent(prompts: Any, start_worker: StartWorker) -> None:
    with LLM(MODEL, protection="open", worker=start_worker(MODEL), compute=ComputeConfig(dtype="float32")) as llm:
        with pytest.raises(PromptError):
            llm.generate(prompts)
        assert llm.stats.rpc_calls == 0
        llm.generate(TEXTS, SamplingParams(max_tokens=1))  # and the session is as good as before


@pytest.mark.parametrize(
    ("partition", "needed"),
    [("linear", {"embed_tokens"}), ("batched", set()), ("op", set())],
)
def test_the_trusted_side_reads_only_what_it_needs(
    partition: PartitionName, needed: set[str], start_worker: StartWorker
) -> None:
    class Recording:
        def __init__(self) -> None:
            self._checkpoint = open_checkpoint(MODEL)
            self.read: set[str] = set()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._checkpoint, name)

        def tensor(self, name: str) -> torch.Tensor:
            self.read.add(name)
            return self._checkpoint.tensor(name)

        def copy(self, name: str, *arguments: Any, **options: Any) -> torch.Tensor:
            self.read.add(name)
            return self._checkpoint.copy(name, *arguments, **options)

        def row_blocks(self, name: str, *rows: int) -> Any:
            self.read.add(name)
            return self._checkpoint.row_blocks(name, *rows)

    checkpoint: Any = Recording()
    address = start_worker(MODEL)
    plan = Plan.of(RunConfig(MODEL, "open", compute=ComputeConfig(partition, dtype="float32", prefill_chunk=8)))
    links = SplitLinks(checkpoint, plan, PARTITIONS[partition], Stats())
    links.connect(lambda _: [Dialled(connect(address))], Until()).close()
    kinds = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in checkpoint.read}
    assert kinds == {"input_layernorm", "post_attention_layernorm", "norm"} | needed


def test_a_worker_that_answers_nonsense_is_an_error_and_not_a_token(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, directory / "model.safetensors")
    with (
        LLM(str(directory), protection="local", compute=ComputeConfig(dtype="float32")) as llm,
        pytest.raises(TsqpError, match="numbers"),
    ):
        llm.generate(TEXTS)


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(PromptError, InputError)
    assert issubclass(InputError, TsqpError)
