"""Where workers are to be had: one at an address, and one after another beside this process."""

from __future__ import annotations

from typing import Any

import pytest

from tsqp.api.places import Standing, StartedHere
from tsqp.api.until import Until
from tsqp.errors import ChannelClosed, DeadlineExceeded, WorkerLost, WorkerUnreachable


class FakeWorker:
    listens = True

    def __init__(self, number: int) -> None:
        self.address = f"shm:///worker-{number}"
        self.pid = 100 + number
        self.ended = False
        self.did: list[str] = []

    def wait_ready(self) -> str:
        self.did.append("waited for")
        return self.address

    def last_words(self) -> str:
        return "it was ended by SIGKILL"

    def kill(self) -> None:
        self.did.append("killed")

    def close(self) -> None:
        self.did.append("closed")


def started_here(
    dial: Any = lambda address, pid: (address, pid), *, spare: bool = False
) -> tuple[StartedHere, list[FakeWorker]]:
    workers: list[FakeWorker] = []

    def start() -> Any:
        workers.append(FakeWorker(len(workers)))
        return workers[-1]

    return StartedHere(start, dial, spare=spare), workers


def dialled(place: StartedHere) -> Any:
    """What came of dialling: here an address and a process."""
    (one,) = place.dial(Until())
    assert one.shard is None
    return one.channel


def test_one_worker_serves_one_session_after_another_until_it_is_left() -> None:
    place, workers = started_here()
    assert place.pid is None
    place.prepare()
    assert dialled(place) == dialled(place) == ("shm:///worker-0", 100)
    place.leave()
    assert (workers[0].did[-2:], place.pid) == (["killed", "closed"], None)
    assert dialled(place) == ("shm:///worker-1", 101)
    assert place.pid == 101
    place.leave()
    place.leave()
    assert len(workers) == 2


def test_a_spare_is_started_once_there_is_time_and_takes_over() -> None:
    place, workers = started_here(spare=True)
    place.prepare()
    assert len(workers) == 1
    place.settled()
    place.settled()
    assert (len(workers), place.pid) == (2, 100)
    place.leave()
    assert (dialled(place), len(workers)) == (("shm:///worker-1", 101), 2)
    place.settled()
    assert len(workers) == 3
    place.close()
    assert [worker.did[-1] for worker in workers] == ["closed"] * 3
    place.settled()
    assert len(workers) == 3


def test_a_spare_that_has_ended_is_of_no_use() -> None:
    place, workers = started_here(spare=True)
    place.prepare()
    place.settled()
    workers[1].ended = True
    place.leave()
    assert dialled(place) == ("shm:///worker-2", 102)
    assert workers[1].did == ["closed"]


def test_nobody_gets_a_spare_who_has_not_asked_for_one() -> None:
    place, workers = started_here()
    place.prepare()
    place.settled()
    assert len(workers) == 1


def test_after_closing_none_is_started() -> None:
    place, workers = started_here()
    place.prepare()
    place.close()
    place.close()
    assert workers[0].did == ["closed"]
    for call in (place.prepare, lambda: place.dial(Until())):
        with pytest.raises(ChannelClosed, match="the model was closed"):
            call()
    assert len(workers) == 1


def test_whoever_waits_is_told_by_the_end_of_the_worker() -> None:
    place, workers = started_here()
    place.interrupt()
    place.prepare()
    place.interrupt()
    assert workers[0].did == ["killed"]


def test_a_worker_that_has_ended_says_how() -> None:
    place, workers = started_here()
    lost = WorkerLost("went away")
    assert place.explained(lost) is lost
    place.prepare()
    assert not place.gone()
    assert place.explained(lost) is lost  # it lives
    workers[0].ended = True
    assert place.gone()
    assert str(place.explained(lost)) == (
        "shm:///worker-0: the worker that was started here went away: it was ended by SIGKILL"
    )
    for other in (DeadlineExceeded("too late"), WorkerLost("went away", side="dealer")):
        assert place.explained(other) is other


def test_a_worker_that_ends_before_it_is_reached_says_so() -> None:
    def unreachable(address: str, pid: int | None) -> Any:
        workers[0].ended = True
        raise WorkerUnreachable("nobody answered")

    place, workers = started_here(unreachable)
    with pytest.raises(WorkerLost, match="SIGKILL"):
        place.dial(Until())


def test_a_standing_worker_is_somebody_elses() -> None:
    asked: list[tuple[str, int | None]] = []

    def dial(address: str, pid: int | None) -> Any:
        asked.append((address, pid))

    place = Standing("tcp://a:1", dial)
    error = WorkerLost("went away")
    for call in (place.prepare, place.settled, place.interrupt, place.leave, lambda: place.dial(Until()), place.close):
        call()
    assert asked == [("tcp://a:1", None)]
    assert (place.name, place.gone(), place.explained(error)) == ("tcp://a:1", False, error)
