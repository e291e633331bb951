"""A provider that hangs costs one question and one thread, and no two questions are asked at once."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.tee.fake_providers import KINDS, fake_of, quote_maker
from tsqp.errors import ProviderFailed
from tsqp.tee.bounded_provider import THREAD_NAME, BoundedProvider
from tsqp.tee.evidence import Kind, Quote
from tsqp.tee.providers import report_data_of

ASKED = bytes(range(64))
PATIENCE_S = 100.0


class Asks:
    """A provider that does what a test says."""

    name = "asks"

    def __init__(self, ask: Callable[[bytes], Quote]) -> None:
        self.ask = ask

    def kind(self) -> Kind:
        return self.ask(ASKED).kind

    def quote(self, report_data: bytes) -> Quote:
        return self.ask(report_data)


def left_behind() -> set[threading.Thread]:
    """Of all tests: a thread that has answered ends a moment later."""
    return {thread for thread in threading.enumerate() if thread.name == THREAD_NAME}


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set it, and what hangs goes on; at the end of a test it does, and is gone."""
    event = threading.Event()
    yield event
    event.set()
    for thread in left_behind():
        thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_its_provider_does(kind: str) -> None:
    fake, provider = fake_of(kind)
    bounded = BoundedProvider(provider, PATIENCE_S)
    assert bounded.kind() == kind
    assert report_data_of(bounded.quote(ASKED)) == ASKED
    fake.make_quote = lambda _: b""
    with pytest.raises(ProviderFailed, match="empty"):
        bounded.quote(ASKED)
    fake.make_quote = quote_maker(kind)
    assert report_data_of(bounded.quote(ASKED)) == ASKED  # a failure is of one question


def test_a_mistake_of_the_caller_is_the_callers() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        BoundedProvider(fake_of("tdx")[1], PATIENCE_S).quote(b"")


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_hangs_fails_and_the_next_fails_at_once_until_it_ends(kind: str, released: threading.Event) -> None:
    fake, provider = fake_of(kind)
    right = fake.make_quote
    asked: list[bytes] = []

    def hang(report_data: bytes) -> bytes:
        asked.append(report_data)
        released.wait()
        return right(report_data)

    fake.make_quote = hang
    bounded, of_others = BoundedProvider(provider, patience_s=0.01), left_behind()
    with pytest.raises(ProviderFailed, match=rf"^{provider.name}: no answer within 0\.01 s: look"):
        bounded.quote(ASKED)
    for question in (lambda: bounded.quote(ASKED), bounded.kind):
        with pytest.raises(ProviderFailed, match="not answered an earlier question"):
            question()
    (thread,) = left_behind() - of_others
    assert thread.daemon  # it does not keep the process from ending
    released.set()
    thread.join()
    assert asked == [ASKED]  # what was refused was never asked
    bounded.patience_s = PATIENCE_S
    assert report_data_of(bounded.quote(ASKED)) == ASKED


def test_no_two_questions_are_asked_at_once() -> None:
    together = threading.Barrier(2)
    met: list[bool] = []

    def ask(report_data: bytes) -> Quote:
        try:
            together.wait(0.2)  # nobody comes: each is alone
            met.append(True)
        except threading.BrokenBarrierError:
            together.reset()
        return Quote(kind="sgx", quote=report_data)

    bounded = BoundedProvider(Asks(ask), PATIENCE_S)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(bounded.quote, (b"one", b"two")))
    assert [answer.quote for answer in answers] == [b"one", b"two"]
    assert met == []


def test_one_that_waits_for_its_turn_does_not_wait_for_ever(
    released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()

    def wait(answers: Sequence[Future[Quote]], patience_s: float) -> Any:
        waits.set()  # the first question has read the patience that it has
        return concurrent.futures.wait(answers, patience_s)

    def ask(report_data: bytes) -> Quote:
        released.wait()
        return Quote(kind="sgx", quote=report_data)

    monkeypatch.setattr("tsqp.tee.bounded_provider.wait", wait)
    bounded = BoundedProvider(Asks(ask), PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(bounded.quote, b"one")
        assert waits.wait(PATIENCE_S)
        bounded.patience_s = 0.01
        with pytest.raises(ProviderFailed, match="others are asking it"):
            bounded.quote(b"two")
        released.set()
        assert first.result().quote == b"one"
