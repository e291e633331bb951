"""A server whose worker is killed or stopped under its streams: clients see a pause, and what they would have seen."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from benchmarks.soak import Look, look_at

from tests.commands import LIMIT_S, Home, children, wait_gone, wait_until
from tests.server.chat_model import chat_model
from tests.server.mixed import mixed
from tests.server.process import serving
from tests.server.reading import Asked, Streams, metrics
from tests.server.recording_process import read_seen, recording
from tests.server.running import Server
from tests.trusted.guard.scan import shared_pads
from tsqp import LLM, ComputeConfig, WorkerConfig
from tsqp.server.ready import Ready
from tsqp.server.run import Running
from tsqp.server.settings import ServerSettings

STREAMS = 16
KILLS = 20
TOKENS = 600
LATER = 12  # pieces of text, at most, from the return of a worker to its end


def asked(salt: str) -> list[Asked]:
    """Requests that find nothing of those with another salt: their prompts are computed."""
    return [Asked(path, {**body, "cache_salt": salt}) for path, body in (mixed(n, TOKENS) for n in range(STREAMS))]


class Workers:
    """The children of a process, one of which serves at a time; each is killed once."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self.killed: list[int] = []

    def kill(self) -> None:
        """The one that is there, or the next one as soon as it is started."""
        wait_until(lambda: bool(self._alive()))
        pid = self._alive()[0]
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        self.killed.append(pid)

    def _alive(self) -> list[int]:
        return [pid for pid in children(self._parent) if pid not in self.killed]


def holds_no_more(pid: int, before: Look) -> bool:
    """Whether a process, which is idle, has no more descriptors, threads and segments than before."""
    now = look_at(pid)
    return all(getattr(now, name) <= getattr(before, name) for name in ("descriptors", "threads", "segments"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("standing", [False, True], ids=["started here", "at an address"])
def test_twenty_kills_under_sixteen_streams(home: Home, tmp_path: Path, standing: bool) -> None:
    """At random moments of the streams, and twice more while the next worker loads or is greeted.

    A worker at an address writes down what it is sent: no two rows have one pad, whatever was killed in between.
    """
    dice = random.Random(20)
    loading = dice.sample(range(1, KILLS), 2)
    options = ["--model", chat_model(), "--served-model-name", "chat", "--port", 0, "--metrics-port", 0]
    with ExitStack() as stack:
        parent = None
        if standing:
            address, parent = stack.enter_context(recording(home, chat_model(), tmp_path))
            options += ["--worker", address]
        server = stack.enter_context(serving(home, *options, "--worker-patience", LIMIT_S))
        pool = stack.enter_context(ThreadPoolExecutor(STREAMS))
        undisturbed = Streams(pool, server.address, asked("undisturbed")).told()
        assert {told.finish_reason for told in undisturbed} == {"length", "stop"}
        assert all(told.done and told.usage for told in undisturbed)
        before, workers = look_at(server.process.pid), Workers(parent or server.process.pid)

        def is_there() -> bool:
            found = metrics(server.metrics_address)
            return found["tsqp:worker_up"] == 1 and found["tsqp:worker_reconnects_total"] == number

        streams = Streams(pool, server.address, asked(""))
        for number in range(KILLS):
            wait_until(is_there)
            streams.wait_for(dice.randrange(LATER))
            workers.kill()
            if number in loading:
                workers.kill()
        assert streams.told() == undisturbed
        found = metrics(server.metrics_address)
        assert found["tsqp:worker_losses_total"] == found["tsqp:worker_reconnects_total"] == KILLS
        assert (found["tsqp:worker_up"], found["tsqp:failed_checks_total"], found["tsqp:workers_expelled"]) == (1, 0, 0)
        assert found["tsqp:requests_added_total"] == found["vllm:request_success_total"] == 2 * STREAMS
        assert found["tsqp:kv_bytes"] == 0
        assert httpx.get(f"{server.address}/readyz", timeout=LIMIT_S).status_code == 200
        wait_until(lambda: holds_no_more(server.process.pid, before))
        (last,) = children(parent or server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
        if not standing:
            wait_gone(last)
    assert home.leftovers() == []
    assert not any("Traceback" in line for line in server.log)
    if standing:
        seen = read_seen(tmp_path)
        assert len(seen) > TOKENS
        assert not shared_pads(seen)


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, True], ids=["past the deadline", "before the deadline"])
def test_a_worker_that_is_stopped_is_a_pause(monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    """Streams have comments meanwhile. Past the deadline it is killed, and another takes over."""
    monkeypatch.setattr("tsqp.server.run.write_logs", lambda *_: None)
    monkeypatch.setattr(Running, "_end_at_once", lambda _, code: None)
    config = WorkerConfig(deadline_s=LIMIT_S if goes_on else 15.0, patience_s=LIMIT_S)
    llm = LLM(str(chat_model()), worker=config, compute=ComputeConfig(threads=1))
    stopped = llm.worker_pid
    assert stopped is not None

    def readiness(ready: Ready) -> str:
        return str(httpx.get(f"{ready.address}/readyz", timeout=LIMIT_S).json().get("code"))

    def client(ready: Ready) -> None:
        with ThreadPoolExecutor(STREAMS) as pool:
            undisturbed = Streams(pool, ready.address, asked("undisturbed")).told()
            streams = Streams(pool, ready.address, asked(""))
            streams.wait_for(100)
            os.kill(stopped, signal.SIGSTOP)
            wait_until(lambda: readiness(ready) == "worker_silent")
            assert httpx.get(f"{ready.address}/livez", timeout=LIMIT_S).status_code == 200
            paused = streams.wait_for_comments()
            if goes_on:
                os.kill(stopped, signal.SIGCONT)
            told = streams.told()
        assert told == undisturbed
        assert paused
        assert all(told[number].comments > 1 for number in paused)
        found = metrics(ready.metrics_address)
        assert found["tsqp:worker_losses_total"] == found["tsqp:worker_reconnects_total"] == (not goes_on)
        assert (found["tsqp:worker_up"], found["tsqp:failed_checks_total"]) == (1, 0)
        wait_until(lambda: readiness(ready) == "None")
        assert (llm.worker_pid == stopped) == goes_on
        if not goes_on:
            wait_gone(stopped)

    with llm:
        settings = ServerSettings(keep_alive_s=0.1, probe_s=0.2)
        Server(llm, threading.Event(), []).run(client, settings=settings, names=["chat"])
    wait_gone(stopped)
