"""The private modes as a user asks for them: masked is the default, and nothing in them is weakened by an option."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import LIMIT_S, Home, Result
from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, GuardConfig, SamplingParams
from tsqp.api.config import ProtectionName
from tsqp.api.pads import Filling, pool_bytes
from tsqp.checkpoint import open_checkpoint
from tsqp.cli.models import describe
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import InputError, ModelMismatch, PadsExhausted
from tsqp.tee.hardening import Hardening

MODEL = str(tiny_model("llama").directory)
RUN = ("--model", MODEL, "--threads", "1")
PRIVATE: tuple[ProtectionName, ...] = ("verified", "masked")
assert list(PRIVATE) == [name for name, protection in PROTECTIONS.items() if protection.checked]
STATS = {"products_checked", "soundness_bits", "model_digest"}
PADS = {"pads_used", "pads_ready", "pads_drained_s"}
Command = Callable[..., Result]


@pytest.fixture
def hardened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled when this process would have been hardened."""
    calls: list[str] = []

    def harden() -> Hardening:
        calls.append("hardened")
        return Hardening(undumpable=True, no_core=True)

    monkeypatch.setattr("tsqp.api.open_model.harden_process", harden)
    return calls


def test_masked_is_the_default_and_states_itself(home: Home) -> None:
    result = home.run("generate", "-", *RUN, "-n", "4", "--json", "--stats", stdin="hello")
    assert result.code == 0, result.err
    answer = result.json
    assert (answer["protection"], answer["partition"], answer["transport"]) == ("masked", "linear", "shm")
    assert (answer["dtype"], answer["wire_dtype"]) == ("field", "uint32")
    assert answer["stats"].keys() >= STATS | PADS
    assert answer["stats"]["products_checked"] == answer["stats"]["rpc_calls"]
    assert (answer["dealer"], answer["dealer_separation"]) == (None, None)
    lines = result.err.splitlines()
    assert lines[0] == "protection masked: the worker sees uniform noise; every product is checked before it is used"
    assert "warning" not in result.err  # the prompt came by standard input
    assert any(line.startswith("partition linear") and "2^-62" in line for line in lines)
    assert f"model digest {answer['stats']['model_digest']}" in result.err
    assert "rows used" in result.err
    assert home.leftovers() == []


@pytest.mark.slow
def test_chat_is_masked_too(home: Home) -> None:
    result = home.run("chat", "--model", "default", "-n", "2", stdin="Hello\n")
    assert result.code == 0, result.err
    assert "protection masked" in result.err


def test_verified_has_checks_and_no_pads(tsqp: Command, start_worker: StartWorker) -> None:
    run = (
        "--protection",
        "verified",
        "--checks",
        "3",
        "-n",
        3,
        "--json",
        "--worker",
        start_worker(MODEL, dtype="field"),
    )
    result = tsqp("generate", "hello", *RUN, *run)
    assert result.code == 0, result.err
    stats = result.json["stats"]
    assert stats.keys() >= STATS
    assert not stats.keys() & PADS
    assert stats["soundness_bits"] == 93.0
    assert result.json["wire_dtype"] == "int16"
    assert not result.json.keys() & {"dealer", "dealer_separation"}
    assert "warning: protection" not in result.err


@pytest.mark.parametrize("name", ["open", "local"])
def test_where_nothing_is_checked_there_are_no_figures_of_a_guard(
    name: ProtectionName, start_worker: StartWorker
) -> None:
    worker = start_worker(MODEL) if name == "open" else None
    with LLM(MODEL, protection=name, worker=worker, compute=ComputeConfig(dtype="float32")) as llm:
        assert llm.guard is None
        assert not llm.stats.as_dict().keys() & (STATS | PADS)


def test_the_same_answer_in_both_private_modes(start_worker: StartWorker) -> None:
    worker, prompt, params = start_worker(MODEL, dtype="field"), random_tokens(70), SamplingParams(max_tokens=12)
    answers = []
    for name in PRIVATE:
        with LLM(MODEL, protection=name, worker=worker) as llm:
            answers.append(llm.generate(prompt, params))
            assert llm.plan.dtype == "float32"
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pads-ahead", "0", "--pads-empty", "refuse"), "can hold no pads"),
        (("--pad-memory", "1KB", "--pads-empty", "refuse"), "or more as --pad-memory"),
        (("--pad-memory", "5XB"), "--pad-memory '5XB' is no size"),
    ],
)
def test_pads_that_could_never_be_are_refused(
    tsqp: Command, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr("tsqp.api.parties.LocalWorker", None)  # nothing is started
    result = tsqp("generate", "hello", *RUN, *flags)
    assert result.code == 2
    assert words in result.error


@pytest.mark.parametrize(
    "flags", [("--partition", "op"), ("--partition", "layer"), ("--dtype", "int8"), ("--compile",)]
)
def test_a_flag_never_chooses_open(tsqp: Command, flags: tuple[str, ...]) -> None:
    """It is refused, in one line that says how to ask for it."""
    assert "--protection open" in tsqp("generate", "hello", *RUN, *flags).error
    assert "--protection open" not in tsqp("generate", "hello", *RUN, "--protection", "masked", *flags).error


def test_a_variable_never_chooses_open_either(tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_PARTITION", "layer")
    result = tsqp("generate", "hello", *RUN)
    assert result.code == 2
    assert "--protection open" in result.error


def test_the_process_is_hardened_in_private_modes_only(start_worker: StartWorker, hardened: list[str]) -> None:
    worker = start_worker(MODEL)
    counts: dict[ProtectionName, int] = {"local": 0, "open": 0, "verified": 1, "masked": 2}
    for name, count in counts.items():
        with LLM(MODEL, protection=name, worker=None if name == "local" else worker):
            assert len(hardened) == count


@pytest.mark.slow
def test_hardening_is_real(home: Home) -> None:
    code = f"""
from tsqp import LLM, ComputeConfig
from tsqp.tee.hardening import current_hardening
for name in ("open", "verified"):
    with LLM({MODEL!r}, protection=name, compute=ComputeConfig(threads=1)):
        print(current_hardening().undumpable)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=home.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout.split() == ["False", str(sys.platform == "linux")], done.stderr


def test_another_models_digest_is_refused(start_worker: StartWorker) -> None:
    worker = start_worker(MODEL, dtype="field")
    with LLM(MODEL, protection="verified", worker=worker) as llm:
        digest = str(llm.stats.as_dict()["model_digest"])
    assert describe(MODEL, digest=True)["model_digest"] == digest
    assert "model_digest" not in describe(MODEL)
    with LLM(MODEL, protection="masked", worker=worker, guard=GuardConfig(model_digest=digest.upper())):
        pass
    with pytest.raises(ModelMismatch, match=f"not the one that was pinned: its digest is {digest}"):
        LLM(MODEL, protection="masked", worker=worker, guard=GuardConfig(model_digest="0" * 64))


def test_warm_pads_are_there_before_the_first_call(start_worker: StartWorker) -> None:
    told: list[Filling] = []
    guard = GuardConfig(pads_ahead=32, warm_pads=True, pads_empty="refuse")
    worker = start_worker(MODEL, dtype="field")
    with LLM(MODEL, protection="masked", worker=worker, guard=guard, pads_progress=told.append) as llm:
        assert told[0].ready == 0
        assert told[-1].ready == told[-1].wanted > 0
        assert told == sorted(told)
        assert llm.session is not None
        assert {(filling.tokens, filling.size) for filling in told} == {(32, pool_bytes(llm.session.config, 32))}
        assert llm.stats.as_dict()["pads_ready"] == 32
        llm.generate(random_tokens(20), SamplingParams(max_tokens=4))
        stats = llm.stats.as_dict()
        assert stats["pads_missed"] == 0
        assert stats["pads_drained_s"] == float(str(stats["pads_ready"])) / float(str(stats["tokens_per_s"]))
        assert llm.guard is not None
        assert llm.guard.filler is not None
        llm.guard.filler.fill()
        sent = llm.stats.rpc_calls
        # What is left of a block comes on top of the 32: never more than 47 are free.
        with pytest.raises(PadsExhausted, match="of the 18 tokens that prompt and answer may have"):
            llm.generate([random_tokens(30), random_tokens(18)], SamplingParams(max_tokens=1))
        with pytest.raises(PadsExhausted, match=r"guard\.warm_pads, guard\.pads_ahead, guard\.pad_memory"):
            llm.generate([random_tokens(30), random_tokens(18)], SamplingParams(max_tokens=1))
        # What the pool never holds is no matter of waiting.
        with pytest.raises(InputError, match="for 32 tokens, prompt and answer together, of the 48 that"):
            llm.generate(random_tokens(30), SamplingParams(max_tokens=19))
        with pytest.raises(InputError, match=r"raise guard\.pads_ahead or guard\.pad_memory"):
            llm.logits(random_tokens(200))
        assert llm.stats.rpc_calls == sent


def test_a_pool_that_memory_shrinks_is_announced(tsqp: Command, start_worker: StartWorker) -> None:
    worker = start_worker(MODEL, "ipc", dtype="field")
    memory = pool_bytes(open_checkpoint(MODEL).config, 32)
    pads = ("--pads-ahead", 64, "--pad-memory", memory, "--warm-pads")
    result = tsqp("generate", "hello", *RUN, "-n", 1, "--worker", worker, *pads)
    assert result.code == 0, result.err
    assert "pads for 32 tokens" not in result.err  # how far it is, is for terminals
    assert f"pads by this process for 32 of 64 tokens ahead: pads may take {memory} bytes of " in result.err


def guards_seconds(
    protection: ProtectionName, worker: str | None, guard: GuardConfig | None = None
) -> dict[str, float]:
    """Seconds of each operator of a run; no more in all than the passes took."""
    with LLM(MODEL, protection=protection, worker=worker, guard=guard) as llm:
        llm.generate(random_tokens(40), SamplingParams(max_tokens=4))
        stats = llm.stats
        operators: dict[str, float] = {str(kind): seconds for kind, seconds in stats.operator_s.items()}
        held = sum(row.held_s for row in stats.calls.values())
        assert 0 < held + sum(operators.values()) <= stats.prefill_s + stats.decode_s
        return operators


def test_the_guards_time_is_counted_where_there_is_a_guard(start_worker: StartWorker) -> None:
    worker = start_worker(MODEL, dtype="field")
    own = {"mask", "check", "pads"}
    assert not guards_seconds("local", None).keys() & own
    verified = guards_seconds("verified", worker)
    assert verified.keys() & own == {"mask", "check"}
    masked = guards_seconds("masked", worker, GuardConfig(pads_ahead=0))
    assert masked.keys() >= own
    assert all(seconds[name] > 0 for seconds in (verified, masked) for name in ("mask", "check"))
    assert masked["pads"] > 0  # every pad was made on the spot
    warm = guards_seconds("masked", worker, GuardConfig(pads_ahead=64, warm_pads=True))
    assert "pads" not in warm


def test_perplexity_is_the_same_in_both_modes(tsqp: Command, start_worker: StartWorker, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2, encoding="utf-8")
    worker = start_worker(MODEL, "ipc", dtype="field")
    asked = ("eval", "perplexity", "--text", text, *RUN, "--window", 40, "--stride", 13, "--json")
    masked = tsqp(*asked, "--worker", worker)
    verified = tsqp(*asked, "--protection", "verified", "--worker", worker)
    plain = tsqp(*asked, "--protection", "local", "--dtype", "float32")
    assert masked.code == verified.code == plain.code == 0, masked.err
    assert (masked.json["protection"], masked.json["wire_dtype"]) == ("masked", "uint32")
    assert masked.json["perplexity"] == verified.json["perplexity"]
    assert masked.json["perplexity"] == pytest.approx(plain.json["perplexity"], rel=0.05)


def test_a_single_token_has_no_speed(tsqp: Command, start_worker: StartWorker) -> None:
    worker = start_worker(MODEL, "ipc", dtype="field")
    result = tsqp("generate", "hello", *RUN, "-n", 1, "--json", "--stats", "--worker", worker)
    assert result.code == 0, result.err
    assert json.loads(result.out)["stats"]["pads_drained_s"] is None
    assert "at this speed" not in result.err
