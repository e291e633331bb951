"""A connection that is given up while it is made: its link is closed, once, whenever it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.workers import FakeLink, scene
from tests.commands import LIMIT_S
from tsqp.api.attempt import Attempt
from tsqp.api.until import Until
from tsqp.errors import ChannelClosed, WorkerUnreachable


class Worker:
    """Somebody to connect to, who answers when ``answers`` is set, with ``error`` if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.link: Any = FakeLink("a", 0)
        self.answers, self.stop = threading.Event(), threading.Event()
        self._error = error

    def connect(self) -> Any:
        assert self.answers.wait(LIMIT_S)
        if self._error is not None:
            raise self._error
        return self.link


def join_attempts() -> None:
    for thread in threading.enumerate():
        if thread.name == "tsqp-connect":
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def test_who_waits_gets_the_link_and_it_stays_open() -> None:
    worker = Worker()
    attempt = Attempt(worker.connect)
    worker.answers.set()
    link: Any = attempt.link(worker.stop)
    join_attempts()
    assert link is worker.link
    assert link.closed == 0


def test_who_waits_gets_the_error() -> None:
    worker = Worker(WorkerUnreachable("nobody answered"))
    worker.answers.set()
    with pytest.raises(WorkerUnreachable, match="nobody answered"):
        Attempt(worker.connect).link(worker.stop)


@pytest.mark.parametrize("error", [None, WorkerUnreachable("nobody answered"), ValueError("a fault")])
def test_what_comes_after_it_was_given_up_is_closed_and_no_error_escapes(error: Exception | None) -> None:
    """An exception that a thread lost would fail this test."""
    worker = Worker(error)
    attempt = Attempt(worker.connect)
    worker.stop.set()
    with pytest.raises(ChannelClosed):
        attempt.link(worker.stop)
    assert worker.link.closed == 0
    worker.answers.set()
    join_attempts()
    assert worker.link.closed == (error is None)
    attempt.wait(worker.stop)  # over: there is nothing to wait for


class Interrupted(threading.Event):
    """Raises an interrupt in whoever waits for it, in place of saying that it was set."""

    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(LIMIT_S):
            raise KeyboardInterrupt
        return False


def test_an_interrupt_between_the_link_and_its_delivery_closes_it() -> None:
    worker = Worker()
    attempt = Attempt(worker.connect)
    attempt._over = Interrupted()
    worker.answers.set()
    with pytest.raises(KeyboardInterrupt):
        attempt.link(worker.stop)
    join_attempts()
    assert worker.link.closed == 1


def test_the_next_attempt_waits_for_one_that_an_interrupt_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once would share what links are made of: check vectors, which no two sessions may have."""
    seen, answers, again = scene("a"), threading.Event(), threading.Event()
    waits: list[int] = []
    connect: Callable[..., Any] = seen.links.connect
    made: list[Attempt] = []
    beside_another: list[bool] = []

    class Watched(Attempt):
        def __init__(self, connect: Callable[[], Any]) -> None:
            beside_another.append(any(not one._over.is_set() for one in made))
            made.append(self)
            super().__init__(connect)

        def wait(self, stop: threading.Event) -> None:
            waits.append(len(made))
            if len(waits) == 1:
                raise KeyboardInterrupt  # the user's, at the first one
            again.set()
            super().wait(stop)

    def slow(dial: Any, until: Until) -> Any:
        assert answers.wait(LIMIT_S)
        return connect(dial, until)

    monkeypatch.setattr("tsqp.api.supervisor.Attempt", Watched)
    monkeypatch.setattr(seen.links, "connect", slow)
    seen.lose()
    with pytest.raises(KeyboardInterrupt):
        seen.decoder()
    second = threading.Thread(target=seen.decoder)
    second.start()
    assert again.wait(LIMIT_S)
    answers.set()
    second.join(LIMIT_S)
    join_attempts()
    assert beside_another == [False, False]
    first, link = seen.links.made[1:]
    assert (first.closed, link.closed) == (1, 0)
    assert seen.supervisor.link is link  # type: ignore[comparison-overlap]
