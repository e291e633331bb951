"""A lock whose turns come in the order in which they were asked for."""

from __future__ import annotations

import threading

import pytest

from tsqp.trusted.engine.turns import Turns


def waiting(turns: Turns, count: int) -> None:
    """Return once so many threads wait."""
    while len(turns._waiting) < count:
        threading.Event().wait(0.001)


def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = Turns(), list[int]()

    def work(index: int) -> None:
        with turns:
            order.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    with turns:
        assert turns.locked()
        for index, thread in enumerate(threads):
            thread.start()
            waiting(turns, index + 1)
    with turns:
        assert order == [0, 1, 2, 3, 4]  # who asks again at once comes last
    for thread in threads:
        thread.join()
    assert not turns.locked()


def test_an_exception_ends_a_turn() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="no"), turns:
        raise ValueError("no")
    assert not turns.locked()


def test_one_who_is_interrupted_while_waiting_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    make = threading.Lock

    class Interrupted:
        """A lock whose second acquisition, the wait, is interrupted."""

        def __init__(self) -> None:
            self.asked = 0

        def acquire(self, timeout: float = -1) -> bool:
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt
            return True

        def release(self) -> None: ...

    with turns:
        monkeypatch.setattr("tsqp.trusted.engine.turns.threading.Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt), turns:
            pass
        monkeypatch.setattr("tsqp.trusted.engine.turns.threading.Lock", make)
        assert not turns._waiting
    assert not turns.locked()


def test_one_who_waits_no_longer_is_passed_over_too() -> None:
    turns = Turns()
    with turns:
        assert not turns.wait(0.01)
        assert turns.locked()
        assert not turns._waiting
    assert turns.wait(0.01)
    turns.end()
    assert not turns.locked()
