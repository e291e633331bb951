"""A server whose worker cheats under load: no client gets a token of it, and whoever looks is told who it was."""

from __future__ import annotations

import random
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tests.api.mortal import MortalRecorder, living
from tests.commands import LIMIT_S, Home, wait_until
from tests.server.chat_model import chat_model
from tests.server.mixed import mixed
from tests.server.process import Serving, serving
from tests.server.reading import Asked, Streams, Told, metrics, read
from tests.trusted.guard import hostile
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import edited
from tests.trusted.guard.scan import shared_pads
from tests.trusted.step_runs import RecordingWorker
from tsqp.api.config import ProtectionName

STREAMS = 16
TOKENS = 150
NEVER = 1 << 60


class Sleeper(MortalRecorder):
    """Honest until it is told; then it answers one product with zeros, of which another text would come."""

    def __init__(self) -> None:
        RecordingWorker.__init__(self, str(chat_model()), edited(hostile.zeros), NEVER)
        self.deaths, self.asked = [], 0

    def wake(self, more: int) -> None:
        """Cheat in the product after so many more."""
        self._at = self.products + more


def asked(salt: str) -> list[Asked]:
    """Requests that find nothing of those with another salt."""
    return [Asked(path, {**body, "cache_salt": salt}) for path, body in (mixed(n, TOKENS) for n in range(STREAMS))]


def options(mode: ProtectionName, *workers: str) -> list[object]:
    """Of a server of the tiny chat model."""
    at = ["--model", chat_model(), "--served-model-name", "chat", "--port", 0, "--metrics-port", 0]
    return [*at, "--protection", mode, *(part for worker in workers for part in ("--worker", worker))]


def cheated(server: Serving, sleeper: Sleeper) -> tuple[list[Told], list[Told]]:
    """What clients are told without and with a false product in the middle of it."""
    dice = random.Random(STREAMS)
    with ThreadPoolExecutor(STREAMS) as pool:
        undisturbed = Streams(pool, server.address, asked("undisturbed")).told()
        assert all(told.done for told in undisturbed)
        streams = Streams(pool, server.address, asked(""))
        streams.wait_for(dice.randrange(100, 300))
        sleeper.wake(dice.randrange(30))
        return undisturbed, streams.told()


def readiness(server: Serving) -> tuple[int, str | None]:
    answer = httpx.get(f"{server.address}/readyz", timeout=LIMIT_S)
    return answer.status_code, answer.json().get("code")


def states(server: Serving) -> tuple[float, ...]:
    """Whether there is a worker, how many were expelled, how many checks have failed, how many workers were lost."""
    names = ("tsqp:worker_up", "tsqp:workers_expelled", "tsqp:failed_checks_total", "tsqp:worker_losses_total")
    found = metrics(server.metrics_address)
    return tuple(found[name] for name in names)


def log_of(server: Serving) -> str:
    """All of it: the server is told to end, and what it writes then is there once it has ended."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(LIMIT_S) == 0
    wait_until(lambda: any("ending:" in line for line in server.log))
    return "".join(server.log)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_where_there_is_no_other_every_stream_ends_with_what_it_did(home: Home, mode: ProtectionName) -> None:
    sleeper = Sleeper()
    with living(sleeper) as address, serving(home, *options(mode, address)) as server:
        undisturbed, told = cheated(server, sleeper)
        assert sleeper.attacked is not None
        failed = [one.error is not None for one in told]
        for ours, whole in zip(told, undisturbed, strict=True):
            if ours.error is None:
                assert ours == whole
                continue
            assert ours.error["code"] == "check_failed"
            assert whole.text.startswith(ours.text)
            assert whole.logprobs[: len(ours.logprobs)] == ours.logprobs
            assert (ours.finish_reason, ours.usage, ours.done) == (None, None, False)
        assert sum(failed) >= STREAMS // 2
        assert sum(bool(one.text) for one, ended in zip(told, failed, strict=True) if ended) > 1, "in the middle"
        products = sleeper.products
        assert products == sleeper.attacked + 1
        assert readiness(server) == (503, "check_failed")
        assert states(server) == (0, 1, 1, 0)
        for one in asked("later"):
            error = read(server.address, one).error
            assert error is not None
            assert error["code"] == "check_failed"
        assert sleeper.products == products
        log = log_of(server)
    assert log.count(f"worker {address} is expelled") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_streams_go_on_with_another_worker(home: Home, mode: ProtectionName) -> None:
    sleeper, honest = Sleeper(), MortalRecorder(model=str(chat_model()))
    with living(sleeper) as false, living(honest) as true, serving(home, *options(mode, false, true)) as server:
        undisturbed, told = cheated(server, sleeper)
        assert told == undisturbed
        assert sleeper.attacked is not None
        assert sleeper.products == sleeper.attacked + 1
        assert honest.products
        assert readiness(server) == (200, None)
        assert states(server) == (1, 1, 1, 0)
        log = log_of(server)
    assert log.count(f"worker {false} is expelled") == 1
    assert f"worker {true} is expelled" not in log
    if mode == "masked":
        assert not shared_pads(sleeper.rows(np.uint32) + honest.rows(np.uint32))
