"""A real model over a real line, asked over HTTP: what the page is told is what the audit finds, whatever happens."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from rich.console import Console as Terminal

from tests.api.mortal import Mortal, MortalRecorder, living, plain_worker
from tests.commands import LIMIT_S
from tests.server.chat_model import IM_END, chat_model
from tests.server.console.watching import URL, named_events
from tests.server.serving import NAME, served, service_of
from tests.trusted.guard import hostile
from tests.trusted.guard.hostile import HostileWorker, edited, serving, store_of
from tsqp import LLM, AsyncLLM, ComputeConfig, WorkerConfig
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.audit.capture import Capture
from tsqp.audit.prompt import AuditPrompt, audit_prompt
from tsqp.audit.report import Attacker
from tsqp.checkpoint import open_checkpoint
from tsqp.cli.audit import ANSWER_TOKENS, run_audit
from tsqp.errors import WorkerUnreachable
from tsqp.server.console.console import open_console
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.wire.channel import Channel

MODEL = str(chat_model())
TEXT = "attack at dawn, say nothing"
PRIVATE: tuple[ProtectionName, ...] = ("verified", "masked")


@dataclass
class Watched:
    """A server with a console at ``url``, and all that has crossed its line."""

    url: str
    model: AsyncLLM
    capture: Capture
    away: threading.Event = field(default_factory=threading.Event)  # set: no worker can be reached

    def ask(self, text: str = TEXT, *, path: str = URL, tokens: int = ANSWER_TOKENS) -> list[tuple[str | None, Any]]:
        """The events of one answer."""
        return named_events("".join(self.stream(text, path=path, tokens=tokens)))

    def stream(self, text: str = TEXT, *, path: str = URL, tokens: int = ANSWER_TOKENS) -> Iterator[str]:
        """Their text as it comes."""
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": tokens,
            "logit_bias": {str(IM_END): -100},
            "stream": True,
        }
        with httpx.stream("POST", self.url + path, json=body, timeout=LIMIT_S) as answer:
            assert answer.status_code == 200, answer.read()
            yield from answer.iter_text()


@contextmanager
def watched(mode: ProtectionName, *workers: Any) -> Iterator[Watched]:
    """``workers``: those that may be asked, in turn; an honest one when none is given."""
    capture, away = Capture(), threading.Event()

    def connect(address: str, **options: Any) -> Channel:
        if away.is_set():
            raise WorkerUnreachable("nobody answers", address=address)
        return capture.connect(address, **options)

    with ExitStack() as stack:
        if not workers:
            workers = (plain_worker(model=MODEL) if mode == "open" else MortalRecorder(model=MODEL),)
        addresses = [
            stack.enter_context(living(one) if isinstance(one, Mortal) else serving(one, "shm")) for one in workers
        ]
        llm = LLM(
            MODEL,
            protection=mode,
            worker=WorkerConfig(tuple(addresses), deadline_s=LIMIT_S, patience_s=LIMIT_S),
            guard=GuardConfig(pads_ahead=0) if mode == "masked" else None,
            compute=ComputeConfig(dtype="float32" if mode == "open" else "auto", threads=1),
            connect=connect,
            taps=True,
        )
        model = AsyncLLM(llm)
        stack.callback(lambda: asyncio.run(model.close(0)))
        service = service_of(model, protection=mode, console=open_console(llm))
        yield Watched(stack.enter_context(served(service)), model, capture, away)


def text_of(events: list[tuple[str | None, Any]]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for name, event in events
        if name is None and event != "[DONE]"
        for choice in event["choices"]
    )


def seen_of(events: list[tuple[str | None, Any]]) -> dict[str, Any]:
    (seen,) = [event for name, event in events if name == "seen"]
    assert events[-2:] == [("seen", seen), (None, "[DONE]")]
    return seen


@pytest.fixture(scope="module")
def prompt() -> AuditPrompt:
    return audit_prompt(Tokenizer(open_checkpoint(MODEL).text_format()), TEXT)


@pytest.fixture(scope="module")
def attacker(prompt: AuditPrompt) -> Attacker:
    checkpoint = open_checkpoint(MODEL)
    return Attacker(checkpoint, Tokenizer(checkpoint.text_format()), prompt)


@pytest.mark.parametrize("mode", ["open", *PRIVATE])
def test_the_page_is_told_what_an_audit_of_the_same_line_finds(mode: ProtectionName, attacker: Attacker) -> None:
    with watched(mode) as server:
        seen = seen_of(server.ask())
        found = attacker.examine(server.capture)
    recovery = found.recoveries[0]
    assert seen["uniformity_p"] == found.uniformity_p
    for name in ("recovered_text", "recovered_fraction", "noise_fraction"):
        assert seen[name] == getattr(recovery, name)
    assert (seen["calls"], seen["user_tokens"], seen["tokens"]) == (found.calls, len(TEXT), ANSWER_TOKENS)
    assert seen["checks"] == (0 if mode == "open" else seen["calls"])
    assert (seen["pads_left"] is None) == (mode != "masked")
    assert sum(seen["histogram"]) * {"open": 4, "verified": 2, "masked": 4}[mode] == seen["kept_bytes"]
    if mode == "masked":
        assert seen["uniformity_p"] > 1e-6
        assert seen["recovered_fraction"] < 0.3
    else:
        assert seen["uniformity_p"] < 1e-9
        assert (seen["recovered_text"], seen["recovered_fraction"]) == (TEXT, 1.0)


@pytest.mark.slow
def test_at_open_it_is_what_the_command_finds() -> None:
    with watched("open") as server:
        seen = seen_of(server.ask())
    notes = Terminal(file=io.StringIO())
    (report,) = run_audit(TEXT, ("open",), model=MODEL, device="cpu", dtype="float32", threads=1, notes=notes)
    theirs = report.as_dict()
    for name in ("recovered_text", "recovered_fraction", "noise_fraction", "uniformity_p", "calls"):
        assert seen[name] == theirs[name], name


@pytest.mark.parametrize("mode", PRIVATE)
def test_a_worker_that_goes_away_in_mid_answer_is_a_pause(mode: ProtectionName) -> None:
    """The text is that of an undisturbed answer, from the console and from the chat API."""
    with watched(mode) as server:
        expected = text_of(server.ask(path="/v1/chat/completions", tokens=40))
        assert text_of(server.ask(tokens=40)) == expected
    mortal = MortalRecorder([30], MODEL)
    with watched(mode, mortal) as server:
        arrived = ""
        server.away.set()  # for who comes back
        for piece in server.stream(tokens=40):
            arrived += piece
            if "event: state" in arrived:
                server.away.clear()
    events = named_events(arrived)
    assert text_of(events) == expected
    states = [event["state"] for name, event in events if name == "state"]
    assert states == ["reconnecting", "ready"]
    seen = seen_of(events)
    assert seen["calls"] > seen["checks"] > 0
    assert seen["user_tokens"] == len(TEXT)


def test_a_worker_that_lies_is_said_to_have_been_caught() -> None:
    with watched("masked", HostileWorker(store_of(MODEL), edited(hostile.flip_low_bit), 40)) as server:
        events = server.ask(tokens=40)
        again = server.ask()
    (state,) = [event for name, event in events if name == "state"]
    assert state["state"] == "failed"
    assert len(state["expelled"]) == 1
    for told in (events, again):
        assert told[-1][1]["error"]["code"] == "worker_cheated"
        assert all(name != "seen" for name, _ in told)


def test_where_another_can_be_asked_the_answer_goes_on_and_the_liar_is_named() -> None:
    liar, honest = HostileWorker(store_of(MODEL), edited(hostile.flip_low_bit), 40), MortalRecorder(model=MODEL)
    with watched("masked", liar, honest) as server:
        events = server.ask(tokens=40)
        expected = text_of(server.ask(path="/v1/chat/completions", tokens=40))
    assert text_of(events) == expected
    states = [event for name, event in events if name == "state"]
    assert states[-1]["state"] == "ready"
    assert len(states[-1]["expelled"]) == 1
    assert seen_of(events)["recovered_fraction"] < 0.3


def test_beside_answers_of_others_it_is_the_same_answer_and_theirs_are_too() -> None:
    others = [f"number {number}" for number in range(3)]
    with watched("verified") as server, ThreadPoolExecutor(len(others) + 1) as pool:
        expected = [text_of(server.ask(text, path="/v1/chat/completions", tokens=30)) for text in (*others, TEXT)]
        theirs = [pool.submit(server.ask, text, path="/v1/chat/completions", tokens=30) for text in others]
        watching = pool.submit(server.ask, tokens=30)
        events = watching.result(LIMIT_S)
        assert [text_of(one.result(LIMIT_S)) for one in theirs] == expected[:-1]
    assert text_of(events) == expected[-1]
    seen = seen_of(events)
    assert seen["recovered_text"] == TEXT
    layers = open_checkpoint(MODEL).config.num_layers
    assert seen["calls"] >= 30 * (4 * layers + 1)
    assert seen["checks"] == seen["calls"]
