"""The line that benchmarks/links.py measures over: late, lossy or slow as asked, and never out of order."""

from __future__ import annotations

import os
import random
import socket
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.link_relay import QUEUE_BYTES, Way, relay
from benchmarks.networks import Condition, network, why_not
from hypothesis import given
from hypothesis import strategies as st

from tsqp.api.config import RunConfig
from tsqp.api.llm import LLM
from tsqp.bench.keyed_worker import keyed_worker
from tsqp.trusted.engine.sampling_params import SamplingParams


def way(delay_s: float = 0.0, loss: float = 0.0, rate: float | None = None) -> Way:
    return Way(delay_s, loss, rate, random.Random(7))


def test_a_packet_arrives_after_its_delay() -> None:
    line = way(delay_s=0.5)
    line.put(b"a", 10.0)
    assert line.next_s == 10.5
    assert line.due(10.4) == []
    assert line.due(10.5) == [b"a"]
    assert line.next_s is None


def test_packets_wait_for_the_rate() -> None:
    line = way(delay_s=1.0, rate=100.0)
    for at_s in (0.0, 0.0, 10.0):
        line.put(bytes(50), at_s)
    assert [len(line.due(at_s)) for at_s in (1.4, 1.5, 1.9, 2.0, 11.4, 11.5)] == [0, 1, 0, 1, 0, 1]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 99)), max_size=30), st.floats(0, 2), st.integers(1, 99))
def test_packets_stay_in_order(packets: list[tuple[int, int]], delay_s: float, rate: int) -> None:
    line, now, sent, came = way(delay_s, rate=float(rate)), 0.0, [], []
    for number, (later, size) in enumerate(packets):
        now += later
        packet = number.to_bytes(2) + bytes(size)
        line.put(packet, now)
        sent.append(packet)
        came += line.due(now)
    assert came + line.due(float("inf")) == sent


def test_the_share_that_is_lost() -> None:
    line = way(loss=0.25)
    for _ in range(4000):
        line.put(b"x", 0.0)
    assert line.dropped + len(line.due(0.0)) == 4000
    assert 900 < line.dropped < 1100
    whole = way()
    whole.put(b"x", 0.0)
    assert whole.dropped == 0


def test_a_full_queue_drops() -> None:
    line = way(rate=1.0)
    for _ in range(3):
        line.put(bytes(QUEUE_BYTES), 0.0)
    assert line.dropped == 1


def test_packets_cross_both_ways_until_the_end() -> None:
    (here, a), (there, b), (end, ending) = (os_socketpair(), os_socketpair(), os.pipe())
    carrier = threading.Thread(target=relay, args=((a, b), (way(0.01), way(0.02)), end))
    carrier.start()
    try:
        os.write(here, b"to there")
        os.write(there, b"to here")
        assert os.read(there, 100) == b"to there"
        assert os.read(here, 100) == b"to here"
    finally:
        os.close(ending)
        carrier.join(10)
        for one in (here, a, there, b, end):
            os.close(one)
    assert not carrier.is_alive()


def os_socketpair() -> tuple[int, int]:
    """Two descriptors of packets: ours, and one that never waits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    return ours.detach(), theirs.detach()


@pytest.mark.slow
def test_an_answer_over_a_line_that_loses_packets_is_the_same(tmp_path: Path) -> None:
    """Masked, over tcp with keys, from one network namespace to another."""
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    run, params = RunConfig("synthetic:tiny", "masked"), SamplingParams(max_tokens=12, ignore_eos=True)
    run = replace(run, guard=replace(run.guard, pads_ahead=0))
    prompt = [1, 2, 3, 4, 5]
    with LLM.of(run) as llm:
        (here,) = llm.generate([prompt], params)
    line = Condition("1 % loss", rtt_s=0.002, loss=0.01)
    with ExitStack() as stack:
        net = stack.enter_context(network(line))
        worker = stack.enter_context(keyed_worker("synthetic:tiny", tmp_path, host=net.host, inside=net.inside))
        llm = stack.enter_context(LLM.of(worker.of(run)))
        assert llm.session is not None
        assert llm.session.transport == "tcp"
        (there,) = llm.generate([prompt], params)
    assert there.token_ids == here.token_ids
    assert len(there.token_ids) == 12
