"""Runs that are oblivious, or locked in memory, and what their evidence says of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import pytest

from tests.commands import LIMIT_S
from tests.families import tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api import plan as plans
from tsqp.api.config import ProtectionName, RunConfig
from tsqp.api.plan import Plan
from tsqp.model.local import LocalEmbedding
from tsqp.model.oblivious_embedding import GrowingEmbedding, OramEmbedding, ScannedEmbedding
from tsqp.model.oram import Oram
from tsqp.server.attestation import configuration_of
from tsqp.tee.memory import may_lock_all
from tsqp.trusted.engine.oblivious import ObliviousSampler

PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]
DRAWN = SamplingParams(
    max_tokens=6, temperature=1.5, top_p=0.9, top_k=30, seed=3, logprobs=2, prompt_logprobs=1, repetition_penalty=1.2
)

LOCKED = """
import sys
from tsqp import LLM, ComputeConfig
from tsqp.server.attestation import configuration_of
with LLM(sys.argv[1], protection="local", compute=ComputeConfig(lock_memory=True, threads=1)) as llm:
    print(llm.generate([[1, 2, 3]])[0].finish_reason, configuration_of(llm).locked_memory)
"""


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The kinds of embedding that were asked for rows."""
    found = list[type]()
    for kind in (LocalEmbedding, ScannedEmbedding, OramEmbedding):
        start = kind.start

        def watched(self: object, tokens: object, start: object = start) -> object:
            found.append(type(self))
            return start(self, tokens)  # type: ignore[operator]

        monkeypatch.setattr(kind, "start", watched)
    return found


@pytest.mark.parametrize("protection", ["local", pytest.param("masked", marks=pytest.mark.slow)])
def test_answers_are_the_same(protection: Literal["local", "masked"], looked_up: list[type]) -> None:
    answers = []
    for oblivious in (False, True):
        looked_up.clear()
        way: Literal["auto", "scan"] = "scan" if oblivious else "auto"
        compute = ComputeConfig(threads=1, oblivious=oblivious, oblivious_embedding=way)
        with LLM(str(tiny_model("llama").directory), protection=protection, compute=compute) as llm:
            answers.append(llm.generate(PROMPTS, DRAWN))
            assert configuration_of(llm).oblivious is oblivious
            assert configuration_of(llm).embedding == ("scan" if oblivious else "plain")
            assert not configuration_of(llm).locked_memory
            ((_, sampler),) = llm.new_answers([[1]], DRAWN)
            assert isinstance(sampler, ObliviousSampler) is oblivious
        assert set(looked_up) == {ScannedEmbedding if oblivious else LocalEmbedding}
    assert answers[0] == answers[1]
    assert answers[0][0].prompt_logprobs is not None


@pytest.mark.parametrize(
    ("oblivious", "way", "told"), [(True, "scan", "scan"), (True, "oram", "oram"), (False, "auto", "plain")]
)
def test_evidence_says_how_a_token_is_looked_up(
    oblivious: bool, way: Literal["auto", "scan", "oram"], told: str, looked_up: list[type]
) -> None:
    """By the table that answers."""
    compute = ComputeConfig(threads=1, oblivious=oblivious, oblivious_embedding=way)
    with LLM(str(tiny_model("llama").directory), protection="local", compute=compute) as llm:
        llm.generate([[1, 2]], SamplingParams(max_tokens=1))
        assert configuration_of(llm).embedding == told
    assert set(looked_up) == {{"plain": LocalEmbedding, "scan": ScannedEmbedding, "oram": OramEmbedding}[told]}


def test_evidence_says_that_a_tree_may_take_over() -> None:
    compute = ComputeConfig(threads=1, oblivious=True)
    with LLM(str(tiny_model("llama").directory), protection="local", compute=compute) as llm:
        assert configuration_of(llm).embedding == "auto"


def test_in_a_tee_it_is_the_default_where_the_worker_does_not_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(protection: Literal["masked", "verified", "open", "local"], oblivious: bool | None = None) -> bool:
        return Plan.of(RunConfig(protection=protection, compute=ComputeConfig(oblivious=oblivious))).oblivious

    assert not chosen("masked")
    monkeypatch.setattr(plans, "detect_tee", lambda: "Intel TDX")
    assert chosen("masked")
    assert chosen("verified")
    assert chosen("local")
    assert not chosen("open")
    assert not chosen("masked", oblivious=False)


def test_no_tree_is_built_where_the_host_may_compare_ciphertexts(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(asked: Literal["auto", "scan", "oram"]) -> str:
        compute = ComputeConfig(oblivious=True, oblivious_embedding=asked)
        return Plan.of(RunConfig(protection="local", compute=compute)).oblivious_embedding

    monkeypatch.setattr(plans, "detect_tee", lambda: "Intel TDX")
    assert [way("auto"), way("scan"), way("oram")] == ["auto", "scan", "oram"]
    monkeypatch.setattr(plans, "detect_tee", lambda: "AMD SEV-SNP")
    assert [way("auto"), way("scan"), way("oram")] == ["scan", "scan", "oram"]


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["local", "masked"])
def test_a_closed_run_builds_no_tree(protection: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could use it, and the thread would go on for minutes."""
    made = list[GrowingEmbedding]()
    monkeypatch.setattr(GrowingEmbedding, "__init__", kept(GrowingEmbedding.__init__, made))
    monkeypatch.setattr(Oram, "filled", False)  # never done
    compute = ComputeConfig(threads=1, oblivious=True)
    path = str(tiny_model("llama").directory)
    with LLM(path, protection=protection, compute=compute) as llm:
        answer = llm.generate([[1, 2, 3]], DRAWN)
        assert made[0]._thread.is_alive()
    assert not made[0]._thread.is_alive()
    with LLM(path, protection=protection, compute=ComputeConfig(threads=1)) as llm:
        assert llm.generate([[1, 2, 3]], DRAWN) == answer


def kept(make: Callable[..., None], made: list[GrowingEmbedding]) -> Callable[..., None]:
    def init(self: GrowingEmbedding, *arguments: object) -> None:
        made.append(self)
        make(self, *arguments)

    return init


@pytest.mark.skipif(not may_lock_all(), reason="this process may not lock all of its memory")
def test_a_locked_run_answers_and_says_so() -> None:
    command = [sys.executable, "-c", LOCKED, str(tiny_model("llama").directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (result.returncode, result.stdout.split()) == (0, ["length", "True"]), result.stderr
