"""A minute of many kinds of requests, most of them given up or wrong: the server holds no more than before."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from contextlib import closing

import httpx
import pytest
from benchmarks.soak import (
    COUNTED,
    HELD,
    Look,
    connections,
    growth,
    idle,
    inconsistent,
    left_alone,
    look_at,
    miscounted,
    serving,
    soak,
    unbalanced,
)

from tests.commands import Home
from tests.server.chat_model import chat_model
from tsqp.wire.transport.shm import ArenaKind
from tsqp.wire.transport.shm.segment import Segment

SOAK_S = 60.0


OUTCOMES = {"answers", "refusals", "requests dropped", "streams left", "streams read"}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [0, 1])
def test_nothing_grows_and_all_adds_up(home: Home, kills: int) -> None:
    """With kills a minute has too few bursts to tell what grows, so that is left to the script's half hour."""
    options = ("--model", str(chat_model()), "--kv-memory", "2MiB")
    with serving(*options, environment=home.environment) as server:
        report = asyncio.run(soak(server, seconds=0.0 if kills else SOAK_S, kills=kills))
        assert (report.faults if kills else report.verdict()) == []
        assert report.kills == kills * len(report.looks)
        assert set(report.outcomes) == OUTCOMES


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_an_arena_is_seen(kind: ArenaKind) -> None:
    before = look_at(os.getpid()).segments
    with closing(Segment(kind, 1 << 16)) as segment:
        assert look_at(os.getpid()).segments == before + 1
        segment.remove_name()
        assert look_at(os.getpid()).segments == before + 1
        segment.memory.close()
    assert look_at(os.getpid()).segments == before


@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
def test_connections_that_are_kept_are_seen(loopback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the client has closed and the server has not; not the listening socket, nor the client's end."""
    pid = os.getpid()
    try:
        listener = socket.create_server((loopback, 0), family=socket.AF_INET6 if ":" in loopback else socket.AF_INET)
    except OSError:
        pytest.skip(f"this machine has no {loopback}")
    with listener:
        port = listener.getsockname()[1]
        assert connections(pid, port) == 0
        with socket.create_connection(listener.getsockname()[:2]):
            accepted, _ = listener.accept()
            with accepted:
                assert connections(pid, port) == 1
        assert connections(pid, port) == 0
        with socket.create_connection(listener.getsockname()[:2]):
            kept, _ = listener.accept()
        with kept:
            assert kept.recv(1) == b""  # the client has gone
            assert connections(pid, port) == 1
            monkeypatch.setattr("benchmarks.soak.IDLE_LIMIT_S", 0.0)
            (told,) = asyncio.run(left_alone(pid, port))
            assert told.startswith("1 connections are held")
        assert asyncio.run(left_alone(pid, port)) == []


def test_what_grows_is_told() -> None:
    flat = [Look(100 << 20, 20, 9, 0)] * 8
    assert growth(flat) == []
    for name, more in {
        "anonymous_bytes": 9 << 20,
        "freed_bytes": 65 << 20,
        "descriptors": 3,
        "threads": 3,
        "segments": 1,
    }.items():
        grown = flat[:6] + [Look(**{**vars(flat[0]), name: getattr(flat[0], name) + more})] * 2
        (told,) = growth(grown)
        assert told.startswith(name)
    assert growth(flat[:3])


def noisy(count: int, growth_bytes: int, seed: int) -> list[Look]:
    dice = random.Random(seed)
    return [Look(round(dice.gauss(900e6, 37e6)) + number * growth_bytes, 14, 13, 1) for number in range(count)]


def test_noise_is_no_growth_and_hides_little() -> None:
    """As much noise as kills make. A leak of some megabytes a look is found in it, and a small one in a longer run."""
    flat = sum(bool(growth(noisy(20, 0, seed))) for seed in range(200))
    assert flat <= 14  # of 200; the tolerance has two standard errors
    assert sum(bool(growth(noisy(20, 12_000_000, seed))) for seed in range(200)) >= 180
    assert sum(bool(growth(noisy(80, 2_000_000, seed))) for seed in range(200)) >= 180


def test_what_does_not_add_up_is_told() -> None:
    right = {
        "vllm:num_requests_running": 1.0,
        "vllm:num_requests_waiting": 2.0,
        "tsqp:requests_added_total": 10.0,
        "vllm:request_success_total": 7.0,
    }
    assert inconsistent(right) == []
    assert len(inconsistent({**right, "tsqp:requests_added_total": 11.0})) == 1
    assert inconsistent({**right, "vllm:num_requests_waiting": -2.0, "tsqp:requests_added_total": 6.0})


def test_a_kill_that_is_not_counted_and_a_check_that_fails_are_told() -> None:
    right = {"tsqp:worker_losses_total": 2.0, "tsqp:worker_reconnects_total": 2.0, "tsqp:failed_checks_total": 0.0}
    assert miscounted(right, 2) == miscounted({}, 0) == []
    for wrong in ({"tsqp:worker_losses_total": 1.0}, {"tsqp:worker_reconnects_total": 3.0}):
        assert miscounted({**right, **wrong}, 2)
    assert miscounted({**right, "tsqp:failed_checks_total": 1.0}, 2) == ["a check has failed"]


def test_a_look_waits_for_all_pads() -> None:
    """They are most of the memory of a small model."""
    times = ("vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count")
    tokens = ("vllm:request_generation_tokens_sum", "vllm:generation_tokens_total")
    busy = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    names = (*COUNTED, *HELD, *times, *tokens, *busy, "tsqp:requests_added_total", "vllm:request_success_total")
    ready = [0, 255, 256]

    def page(request: httpx.Request) -> httpx.Response:
        figures = dict.fromkeys(names, 0) | {"tsqp:pads_ahead": 256, "tsqp:pads_ready_prompt": ready.pop(0)}
        return httpx.Response(200, text="".join(f"{name} {value}\n" for name, value in figures.items()))

    async def wait() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(page)) as client:
            return await idle(client, "http://server/metrics", 0)

    assert asyncio.run(wait()) == []
    assert not ready


def test_what_endpoints_and_engine_count_differently_is_told() -> None:
    right = {
        "tsqp:requests_added_total": 10.0,
        **dict.fromkeys(COUNTED, 10.0),
        **dict.fromkeys(HELD, 0.0),
        "vllm:time_to_first_token_seconds_count": 8.0,
        "vllm:inter_token_latency_seconds_count": 90.0,
        "vllm:request_generation_tokens_sum": 95.0,
        "vllm:generation_tokens_total": 102.0,
    }
    assert unbalanced(right) == []
    for name, wrong in {**dict.fromkeys(COUNTED, 9.0), **dict.fromkeys(HELD, 0.5)}.items():
        (told,) = unbalanced({**right, name: wrong})
        assert told.startswith(name)
    for name, wrong in (("vllm:request_generation_tokens_sum", 99.0), ("vllm:generation_tokens_total", 97.0)):
        assert len(unbalanced({**right, name: wrong})) == 1
