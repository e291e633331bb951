"""The private modes as a user asks for them: masked is the default, and nothing in them is weakened by an option."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import LIMIT_S, Home, Result
from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, GuardConfig, SamplingParams
from tsqp.api.pads import Filling, pool_bytes
from tsqp.checkpoint import open_checkpoint
from tsqp.cli.models import describe
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import ModelMismatch, OptionError, PadsExhausted
from tsqp.tee.hardening import Hardening

MODEL = str(tiny_model("llama").directory)
RUN = ("--model", MODEL, "--threads", "1")
PRIVATE = [name for name, protection in PROTECTIONS.items() if protection.checked]
STATS = {"checks", "soundness_bits", "model_digest"}
PADS = {"pads_used", "pads_ready", "pads_drained_s"}
Command = Callable[..., Result]


@pytest.fixture
def hardened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled when this process would have been hardened."""
    calls: list[str] = []

    def harden() -> Hardening:
        calls.append("hardened")
        return Hardening(undumpable=True, no_core=True)

    monkeypatch.setattr("tsqp.api.llm.harden_process", harden)
    return calls


def test_masked_is_the_default_and_states_itself(home: Home) -> None:
    result = home.run("generate", "-", *RUN, "-n", "4", "--json", "--stats", stdin="hello")
    assert result.code == 0, result.err
    answer = result.json
    assert (answer["protection"], answer["partition"], answer["transport"]) == ("masked", "linear", "shm")
    assert (answer["dtype"], answer["wire_dtype"]) == ("field", "uint32")
    assert answer["stats"].keys() >= STATS | PADS
    assert answer["stats"]["checks"] == answer["stats"]["rpc_calls"]
    assert (answer["dealer"], answer["dealer_separation"]) == (None, None)
    first, second = result.err.splitlines()[:2]
    assert first == "protection masked: the worker sees uniform noise; every product is checked before it is used"
    assert "warning" not in result.err  # the prompt came by standard input
    assert "2^-62" in second
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
def test_where_nothing_is_checked_there_are_no_figures_of_a_guard(name: str, start_worker: StartWorker) -> None:
    worker = start_worker(MODEL) if name == "open" else None
    with LLM(MODEL, protection=name, dtype="float32", worker=worker) as llm:
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


# What is refused, by flag and by name, and the words that say so.
FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "bfloat16": (("--dtype", "bfloat16"), "leave out --dtype"),
    "int8": (("--dtype", "int8"), "leave out --dtype"),
    "wire dtype": (("--wire-dtype", "bfloat16"), "leave out --wire-dtype"),
    "compile": (("--compile",), "the private modes do not use torch.compile: leave out --compile"),
    "plain kernels": (("--no-compiled-kernels",), "leave out --no-compiled-kernels"),
    "partition op": (("--partition", "op"), "partition op"),
    "partition layer": (("--partition", "layer"), "partition layer"),
    "no checks": (("--checks", "0"), "--checks must be 1 to 16"),
    "no digest": (("--model-digest", "abc"), "--model-digest is 64 hex digits"),
    "no size": (("--pad-memory", "5XB"), "5XB"),
    "no source": (("--pad-source", "heaven"), "heaven"),
    "no dealer": (("--dealer-no-separation",), "leave out --dealer-no-separation"),
    "no dealer's key": (("--dealer-key", "x"), "leave out --dealer-key"),
    "fewer than no pads": (("--pads-ahead", "-1"), "--pads-ahead must be 0 or more tokens, not -1"),
    "an empty pool, filled": (("--warm-pads", "--pads-ahead", "0"), "--pads-ahead 0 keeps empty"),
    "no pads, ever": (("--pads-ahead", "0", "--pads-empty", "refuse"), "can hold no pads"),
    "no memory for pads": (("--pad-memory", "1KB", "--pads-empty", "refuse"), "--pad-memory"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_what_a_private_mode_cannot_honour_is_refused(
    tsqp: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tsqp.api.llm.LocalWorker", None)  # nothing is started
    flags, words = FLAGS[name]
    for stated in ((), ("--protection", "masked")):
        result = tsqp("generate", "hello", *RUN, *stated, *flags)
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


PADS_FLAGS: list[tuple[str, ...]] = [
    ("--pad-source", "dealer=ipc:///x"),
    ("--dealer-key", "x"),
    ("--dealer-no-separation",),
    ("--pads-ahead", "5"),
    ("--pad-memory", "1GB"),
    ("--pads-empty", "refuse"),
    ("--warm-pads",),
]


@pytest.mark.parametrize("flags", PADS_FLAGS, ids=str)
@pytest.mark.parametrize("protection", ["verified", "open", "local"])
def test_flags_of_pads_play_a_part_in_masked_only(tsqp: Command, protection: str, flags: tuple[str, ...]) -> None:
    result = tsqp("generate", "hello", *RUN, "--protection", protection, *flags)
    assert result.code == 2
    assert f"leave out {flags[0]}" in result.error


@pytest.mark.parametrize("flags", [("--checks", "3"), ("--model-digest", "0" * 64)], ids=str)
@pytest.mark.parametrize("protection", ["open", "local"])
def test_flags_of_checks_play_a_part_in_private_modes_only(
    tsqp: Command, protection: str, flags: tuple[str, ...]
) -> None:
    result = tsqp("generate", "hello", *RUN, "--protection", protection, *flags)
    assert result.code == 2
    assert f"leave out {flags[0]}" in result.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bfloat16"}, "leave out dtype bfloat16"),
        ({"dtype": "int8"}, "leave out dtype int8"),
        ({"wire_dtype": "float32"}, "leave out wire_dtype"),
        ({"compiled_kernels": False}, "leave out compiled_kernels"),
        ({"compiled_worker": True}, "leave out compiled_worker"),
        ({"partition": "layer"}, "cannot use partition layer"),
        ({"guard": GuardConfig(checks=0)}, "1 to 16"),
        ({"guard": GuardConfig(pads_empty="refuse", pads_ahead=0)}, "can hold no pads"),
    ],
)
@pytest.mark.parametrize("protection", PRIVATE)
def test_options_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, protection: str, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("tsqp.api.llm.LocalWorker", None)  # nothing is started
    if protection == "verified" and "can hold" in words:
        words = "has no pads: leave out pads_ahead, pads_empty"
    with pytest.raises(OptionError, match=words):
        LLM(MODEL, protection=protection, **options)
    with pytest.raises(OptionError, match="checks no products: leave out guard"):
        LLM(MODEL, protection="open", guard=GuardConfig())


def test_the_process_is_hardened_in_private_modes_only(start_worker: StartWorker, hardened: list[str]) -> None:
    worker = start_worker(MODEL)
    for name, count in (("local", 0), ("open", 0), ("verified", 1), ("masked", 2)):
        with LLM(MODEL, protection=name, worker=None if name == "local" else worker):
            assert len(hardened) == count


def test_hardening_is_real(home: Home) -> None:
    code = f"""
from tsqp import LLM
from tsqp.tee.hardening import current_hardening
for name in ("open", "verified"):
    with LLM({MODEL!r}, protection=name, threads=1):
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
        assert {(filling.tokens, filling.size) for filling in told} == {(32, pool_bytes(llm.session.spec, 32))}
        assert llm.stats.as_dict()["pads_ready"] == 32
        llm.generate(random_tokens(20), SamplingParams(max_tokens=4))
        stats = llm.stats.as_dict()
        assert stats["pads_missed"] == 0
        assert stats["pads_drained_s"] == float(str(stats["pads_ready"])) / float(str(stats["tokens_per_s"]))
        sent = llm.stats.rpc_calls
        with pytest.raises(PadsExhausted, match="32 of the 33 tokens asked for: raise --pads-ahead"):
            llm.generate([random_tokens(20), random_tokens(13)])
        with pytest.raises(PadsExhausted, match="--warm-pads, --pads-ahead N, --pad-memory"):
            llm.logits(random_tokens(200))
        assert llm.stats.rpc_calls == sent


def test_a_pool_that_memory_shrinks_is_announced(tsqp: Command, start_worker: StartWorker) -> None:
    worker = start_worker(MODEL, "ipc", dtype="field")
    memory = pool_bytes(open_checkpoint(MODEL).spec, 32)
    pads = ("--pads-ahead", 64, "--pad-memory", memory, "--warm-pads")
    result = tsqp("generate", "hello", *RUN, "-n", 1, "--worker", worker, *pads)
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert [line.startswith("filling pads for 32 tokens, ") for line in lines].count(True) == 1
    assert lines.count("pads for 32 tokens are ready") == 1
    assert "pads by this process for 32 of 64 tokens ahead (--pad-memory " in result.err


def guards_seconds(protection: str, worker: str | None, guard: GuardConfig | None = None) -> dict[str, float]:
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
    assert masked["pads"] > masked["check"]  # every pad was made on the spot
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
