"""Loads on a server, in virtual time: who asks when, and from when on a wait counts."""

from __future__ import annotations

import asyncio
import statistics
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.virtual_time import hold_up, run
from tsqp.bench.arrivals import arrival_times, closed_loop, open_loop, prompts
from tsqp.bench.latency import Answer
from tsqp.errors import WorkerFailed


def now() -> float:
    return asyncio.get_running_loop().time()


class OneAtATime:
    """A server that gives each answer, of two tokens, in ``seconds``, and one at a time. ``sent``: when each came."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free = asyncio.Lock()
        self.sent: list[float] = []
        self.most = self._there = 0

    async def ask(self, prompt: list[int], asked_s: float) -> Answer:
        self.sent.append(now())
        self._there += 1
        self.most = max(self.most, self._there)
        async with self._free:
            await asyncio.sleep(self._seconds)
        self._there -= 1
        return Answer(asked_s, arrived_s=(now(), now()), tokens=2)


@given(st.floats(0.1, 50), st.floats(0.1, 20), st.integers(0, 1000))
def test_arrivals_are_in_order_within_the_time_and_the_same_for_a_seed(rate: float, seconds: float, seed: int) -> None:
    moments = arrival_times(rate, seconds, seed)
    assert moments == sorted(moments) == arrival_times(rate, seconds, seed)
    assert moments[0] > 0
    assert len(moments) == 1 or moments[-1] < seconds
    longer = arrival_times(rate, 2 * seconds, seed)
    assert longer[: len(moments)] == moments


def test_gaps_between_arrivals_are_exponential() -> None:
    moments = arrival_times(4.0, 5000.0, 1)
    gaps = [later - one for one, later in pairwise(moments)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)  # as the mean: nothing regular about them
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(2.718**-2, rel=0.1)


def test_other_seeds_other_arrivals_and_prompts() -> None:
    assert arrival_times(1.0, 50.0, 1) != arrival_times(1.0, 50.0, 2)
    assert next(prompts(8, 1)) != next(prompts(8, 2))


def test_prompts_are_tokens_of_every_vocabulary_and_share_no_beginning() -> None:
    made = list(islice(prompts(16, 0), 50))
    assert made == list(islice(prompts(16, 0), 50))
    assert all(len(prompt) == 16 and 0 <= min(prompt) <= max(prompt) < 256 for prompt in made)
    assert len({tuple(prompt[:4]) for prompt in made}) == 50


def test_a_wait_counts_from_the_moment_that_was_drawn_not_from_when_the_server_was_free() -> None:
    async def work() -> list[Answer]:
        answers, start, end = await open_loop(OneAtATime(1.0).ask, prompts(2, 0), [0.0, 0.1, 0.2])
        assert end - start == pytest.approx(3.0)
        return answers

    assert [answer.first_s for answer in run(work())] == pytest.approx([1.0, 1.9, 2.8])


def test_a_wait_counts_from_that_moment_where_the_client_itself_was_held_up() -> None:
    """Coordinated omission: a client that asks late, and counts from there, does not see the stall at all."""

    async def ask(prompt: list[int], asked_s: float) -> Answer:
        sent.append(now())
        if len(sent) == 1:
            hold_up(5.0)
        return Answer(asked_s, arrived_s=(now(),), tokens=1)

    async def work() -> list[float]:
        answers, start, _ = await open_loop(ask, prompts(2, 0), [0.0, 1.0, 2.0, 7.0])
        assert [one - start for one in sent] == pytest.approx([0.0, 5.0, 5.0, 7.0])
        return [answer.first_s for answer in answers]

    sent: list[float] = []
    assert run(work()) == pytest.approx([5.0, 4.0, 3.0, 0.0], abs=1e-6)


def test_strangers_do_not_wait_for_each_other() -> None:
    async def work() -> None:
        server = OneAtATime(10.0)
        _, start, _ = await open_loop(server.ask, prompts(2, 0), [0.5, 1.0, 4.0])
        assert [one - start for one in server.sent] == pytest.approx([0.5, 1.0, 4.0])

    run(work())


def test_each_client_of_a_closed_loop_asks_again_until_the_time_is_over() -> None:
    async def work() -> None:
        server = OneAtATime(1.0)
        answers, start, end = await closed_loop(server.ask, prompts(2, 0), 3, 4.5)
        assert server.most == 3
        # One answer a second: the client that has its own after 5 s is the first that asks no more.
        assert end - start == pytest.approx(5.0)
        assert [answer.arrived_s[-1] - start for answer in answers] == pytest.approx([1, 2, 3, 4, 5, 6, 7])
        assert [answer.first_s for answer in answers] == pytest.approx([1, 2, 3, 3, 3, 3, 3])

    run(work())


def test_each_client_asks_once_however_short_the_time() -> None:
    async def work() -> None:
        answers, start, end = await closed_loop(OneAtATime(1.0).ask, prompts(2, 0), 3, 0.001)
        assert len(answers) == 3
        assert end - start == pytest.approx(1.0)

    run(work())


def test_no_more_is_asked_than_there_are_pads_for() -> None:
    async def work() -> None:
        answers, start, end = await closed_loop(OneAtATime(1.0).ask, prompts(2, 0), 2, 100.0, 5)
        assert len(answers) == 5
        assert end - start == pytest.approx(4.0)  # the one that got the fourth finds nothing left to ask

    run(work())


def test_what_ends_one_request_ends_the_measurement_as_it_is() -> None:
    async def ask(prompt: list[int], asked_s: float) -> Answer:
        await asyncio.sleep(1.0)
        raise WorkerFailed("it went away")

    with pytest.raises(WorkerFailed, match="it went away"):
        run(closed_loop(ask, prompts(2, 0), 3, 5.0))
    with pytest.raises(WorkerFailed, match="it went away"):
        run(open_loop(ask, prompts(2, 0), [0.0, 9.0]))
