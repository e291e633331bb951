"""The peer transformers computes the same model, as its users run it; its process rests while others are measured."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.results import TINY
from tests.families import tiny_model
from tsqp import LLM, ComputeConfig
from tsqp.bench import transformers_server
from tsqp.bench.peer import TransformersPeer
from tsqp.bench.rpc import cpu_seconds
from tsqp.bench.transformers_server import TransformersModel
from tsqp.errors import UnsupportedModel, WorkerFailed

IDLE_S = 0.3


@pytest.fixture(scope="module")
def peer() -> Iterator[TransformersPeer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        started = TransformersPeer(TINY, "float32", "cpu", 2)
    with started:
        yield started


def test_it_runs_the_same_model() -> None:
    model, prompt = TransformersModel(TINY, torch.float32, "cpu"), [1, 2, 3, 250]
    with torch.inference_mode():
        theirs = model._model(torch.tensor([prompt])).logits[0]
    with LLM(TINY, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        torch.testing.assert_close(theirs, llm.logits(prompt), rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_prompts() -> None:
    model, seen = TransformersModel(TINY, torch.float32, "cpu"), list[tuple[int, ...]]()
    real = model._model.forward

    def forward(ids: torch.Tensor, **options: Any) -> Any:
        seen.append(tuple(ids.shape))
        return real(ids, **options)

    model._model.forward = forward
    model.run_together([[1, 2, 3], [4, 5, 6]], 2)
    assert seen == [(2, 3), (2, 1), (2, 1)]


def test_it_has_our_threads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    class Told:
        name = "told"

        def __init__(self, *options: Any) -> None:
            asked.append(options)

        def run_together(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
            asked.append((prompts, steps))
            return 1.5, 0.25

    monkeypatch.setattr(transformers_server, "TransformersModel", Told)
    monkeypatch.setattr(transformers_server, "REST_S", 0.0)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["", TINY, "bfloat16", "cuda:1", "3"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompts": [[1, 2]], "steps": 4}\n')))
    transformers_server.main()
    assert asked == [3, (TINY, torch.bfloat16, "cuda:1"), ([[1, 2]], 4)]
    assert capsys.readouterr().out.splitlines() == ['{"name": "told"}', '{"prefill_s": 1.5, "decode_s": 0.25}']


def test_its_process_waits_as_its_users_do_and_rests_after_an_answer(peer: TransformersPeer) -> None:
    """Our own processes wait passively; this one spins for some milliseconds, and no longer."""
    assert peer.name.startswith("transformers ")
    prefill_s, decode_s = peer.run_together([[1] * 64] * 2, 3)
    busy = cpu_seconds(peer.pid)
    time.sleep(IDLE_S)
    assert cpu_seconds(peer.pid) - busy < 0.1 * IDLE_S
    assert min(prefill_s, decode_s) > 0
    assert b"OMP_WAIT_POLICY" not in Path(f"/proc/{peer.pid}/environ").read_bytes()


def test_a_model_that_cannot_be_loaded_is_one_line() -> None:
    with pytest.raises(WorkerFailed, match=r"transformers failed: RuntimeError: .*nonsense") as failed:
        TransformersPeer(TINY, "float32", "nonsense", 1)
    assert "\n" not in str(failed.value)


def test_a_model_whose_settings_cannot_be_written_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(UnsupportedModel, match="gemma2"):
        TransformersPeer(str(tiny_model("gemma2").directory), "float32", "cpu", 1)


def test_a_process_that_goes_away() -> None:
    with TransformersPeer(TINY, "float32", "cpu", 1) as peer:
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="went away"):
            peer.run([1], 1)


def test_what_fails_there_is_one_line() -> None:
    with TransformersPeer(TINY, "float32", "cpu", 1) as peer:
        with pytest.raises(WorkerFailed, match="transformers failed: IndexError: index out of range") as failed:
            peer.run([10**6], 1)
        assert "\n" not in str(failed.value)
