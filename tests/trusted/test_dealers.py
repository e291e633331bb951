"""Several dealers: which one is asked, what one that is lost costs, and who is named for a wrong product."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from tsqp.errors import ChannelError, DeadlineExceeded, ProductMismatch, ProtocolError, WorkerFailed, WorkerLost
from tsqp.trusted import dealers as module
from tsqp.trusted.dealers import Dealers

PADS = np.zeros((16, 4), np.uint32)
KEYS = [bytearray(32)]


class FakeSession:
    """``fails``: what the next request ends it with."""

    def __init__(self, name: str) -> None:
        self.address = f"tcp://{name}:1"
        self.ended: ChannelError | None = None
        self.fails: ChannelError | None = None
        self.asked = 0
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class FakeSource:
    def __init__(self, session: Any) -> None:
        self._session = session

    def products(self, group: Any, keys: Any, pads: Any) -> Any:
        session = self._session
        if session.ended is not None:
            raise session.ended
        session.asked += 1
        if session.fails is not None:
            session.ended = session.fails
            raise session.ended
        return session.address


@pytest.fixture(autouse=True)
def _no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DealerPadSource", FakeSource)


def dealers(*names: str) -> tuple[Dealers, list[FakeSession]]:
    sessions: list[Any] = [FakeSession(name) for name in names]
    return Dealers([(session, name) for session, name in zip(sessions, names, strict=True)]), sessions


def made_by(several: Dealers, blocks: int = 1) -> Any:
    group: Any = None
    return several.products(group, KEYS * blocks, PADS)


def test_blocks_are_shared_among_them() -> None:
    several, sessions = dealers("a", "b", "c")
    made_by(several, 4)
    for _ in range(8):
        made_by(several)
    assert sorted(session.asked for session in sessions) == [1, 4, 4]


@pytest.mark.parametrize("error", [WorkerLost("gone"), WorkerFailed("no memory"), DeadlineExceeded("late")])
def test_what_one_that_is_lost_was_asked_for_is_made_by_another(error: ChannelError) -> None:
    several, sessions = dealers("a", "b")
    sessions[0].fails = error
    assert [made_by(several) for _ in range(3)] == ["tcp://b:1"] * 3
    assert several.ended is None
    assert [session.asked for session in sessions] == [1, 3]
    sessions[1].fails = WorkerLost("gone too")
    for _ in range(2):
        with pytest.raises(WorkerLost, match="gone too"):
            made_by(several)
    assert several.ended is sessions[1].ended


@pytest.mark.parametrize("dies", [0, 1])
def test_while_one_is_there_the_dealing_goes_on_whichever_of_them_died(dies: int) -> None:
    several, sessions = dealers("a", "b")
    sessions[dies].fails = WorkerLost("gone")
    assert {made_by(several) for _ in range(4)} == {sessions[1 - dies].address}
    assert (sessions[dies].asked, several.ended) == (1, None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_end_of_all_is_the_end_of_the_one_that_was_left_last(order: tuple[int, ...]) -> None:
    several, sessions = dealers("a", "b", "c")
    for number in order:
        assert several.ended is None
        sessions[number].fails = WorkerLost(f"{number} has gone")
        with suppress(WorkerLost):
            for _ in range(3):  # until it is its turn
                made_by(several)
    assert several.ended is sessions[order[-1]].fails
    with pytest.raises(WorkerLost, match=f"{order[-1]} has gone"):
        made_by(several)
    assert all(several.ended_by(session.fails) for session in sessions if session.fails is not None)
    assert not several.ended_by(WorkerLost("0 has gone"))


def test_a_broken_protocol_is_no_loss() -> None:
    several, sessions = dealers("a", "b")
    sessions[0].fails = ProtocolError("an old id")
    with pytest.raises(ProtocolError):
        made_by(several)
    assert sessions[1].asked == 0


def test_a_wrong_product_is_about_whoever_was_asked_last() -> None:
    several, sessions = dealers("a", "b")
    sessions[0].fails = WorkerLost("gone")

    def check() -> None:
        with several.named():
            made_by(several)
            raise ProductMismatch("products of pads are wrong")

    with pytest.raises(ProductMismatch, match="tcp://b:1: products of pads are wrong") as caught:
        check()
    assert caught.value.worker == "b"


def test_an_error_that_came_before_anybody_was_asked_is_about_nobody() -> None:
    several, _ = dealers("a")
    made_by(several)

    def fail() -> None:
        with several.named():
            raise ProductMismatch("of another thread")

    with pytest.raises(ProductMismatch) as caught:
        fail()
    assert caught.value.worker is None


def test_one_without_a_name_is_not_named() -> None:
    several, _ = dealers("")

    def check() -> None:
        with several.named():
            made_by(several)
            raise ProductMismatch("wrong")

    with pytest.raises(ProductMismatch, match=r"^wrong$"):
        check()


def test_all_are_left() -> None:
    several, sessions = dealers("a", "b")
    several.close()
    assert [session.closed for session in sessions] == [1, 1]
