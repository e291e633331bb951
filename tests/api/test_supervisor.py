"""What becomes of a run whose worker is lost or cheats: who is asked next, when, and when nobody is."""

from __future__ import annotations

import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.workers import FakeLinks, FakePlace, Scene, scene
from tests.commands import LIMIT_S
from tsqp.api.supervisor import FIRST_WAIT_S, LONGEST_WAIT_S
from tsqp.api.until import Until
from tsqp.errors import (
    ArenaFull,
    ChannelClosed,
    ChannelError,
    CorruptCheckpoint,
    DeadlineExceeded,
    NumericError,
    PathRefused,
    ProductMismatch,
    ProtocolError,
    ReplyRangeError,
    ReplyShapeError,
    RosterError,
    WorkerFailed,
    WorkerLost,
    WorkerUnreachable,
)

LOST = [WorkerLost, WorkerUnreachable, WorkerFailed, DeadlineExceeded]
CHEATS: list[ChannelError] = [
    ProductMismatch("wrong"),
    ReplyRangeError("wrong"),
    ProtocolError("wrong"),
    ReplyShapeError(8, 4),
]


def dialled(seen: Scene) -> list[int]:
    return [place.dialled for place in seen.places]


def test_while_nothing_happens_the_decoder_stays() -> None:
    seen = scene("a", "b")
    assert {seen.decoder() for _ in range(3)} == {"decoder 0"}
    state = seen.supervisor.state()
    assert (state.state, state.address, state.losses, state.reconnects, state.error) == ("ready", "a", 0, 0, None)
    assert not seen.supervisor.look()


@pytest.mark.parametrize("lost", LOST)
def test_after_a_loss_the_next_in_turn_is_asked_at_once(lost: type[ChannelError]) -> None:
    seen = scene("a", "b", "c")
    assert seen.lose(lost("went away"))
    assert seen.supervisor.state().state == "reconnecting"
    assert seen.decoder() == "decoder 1"
    assert dialled(seen) == [1, 1, 0]
    assert [place.left for place in seen.places] == [1, 0, 0]
    assert [place.sessions for place in seen.places] == [1, 1, 0]
    assert not seen.clock.waits
    assert [link.closed for link in seen.links.made] == [1, 0]
    assert seen.links.renewed == 1
    state = seen.supervisor.state()
    assert (state.state, state.address, state.losses, state.reconnects) == ("ready", "b", 1, 1)


def test_one_place_alone_is_asked_again() -> None:
    seen = scene("a")
    seen.lose()
    assert seen.decoder() == "decoder 1"
    assert dialled(seen) == [2]


def test_the_turn_goes_round() -> None:
    seen = scene("a", "b")
    for number in range(1, 5):
        seen.lose()
        assert seen.decoder() == f"decoder {number}"
        seen.supervisor.passed()
    assert dialled(seen) == [3, 2]


def test_waits_between_rounds_grow_to_a_bound_and_are_no_longer_than_patience() -> None:
    seen = scene("a", "b")
    for place in seen.places:
        place.down = WorkerUnreachable("nobody there")
    seen.lose()
    with pytest.raises(WorkerLost, match="no worker within 60 s: nobody there"):
        seen.decoder()
    waits = seen.clock.waits
    assert waits[:4] == [2 * FIRST_WAIT_S] * 2 + [4 * FIRST_WAIT_S] * 2  # two places in each round
    assert max(waits) == LONGEST_WAIT_S
    assert sum(waits) == pytest.approx(60.0)
    assert seen.links.within[0] == math.inf  # at the start, where the handshakes are bounded as calls are
    assert all(0 < within <= 60.0 for within in seen.links.within[1:])
    assert abs(dialled(seen)[0] - dialled(seen)[1]) <= 1


def test_an_attempt_may_take_no_longer_than_patience_and_is_told_of_the_end() -> None:
    """A team of which nobody answers would otherwise be dialled on and on while every request waits."""
    seen = scene("a", "b", patience_s=10.0)
    connect: Any = seen.links.connect

    def slow(dial: Any, until: Until) -> Any:
        seen.clock.now += 4.0
        return connect(dial, until)

    seen.links.connect = slow  # type: ignore[method-assign]
    for place in seen.places:
        place.down = WorkerUnreachable("nobody answered")
    seen.lose()
    with pytest.raises(WorkerLost, match="no worker within 10 s"):
        seen.decoder()
    waited = sum(seen.clock.waits)
    assert waited < 2.0
    left = [10.0, 6.0, 2.0 - waited]
    assert all(most - 1.0 < given <= most for given, most in zip(seen.links.within[1:], left, strict=True))
    assert not seen.links.untils[-1].stopped()
    seen.supervisor.stop()
    assert [until.stopped() for until in seen.links.untils] == [True] * 4  # the one at the start too


def test_an_error_that_nobody_expected_ends_an_attempt_and_not_the_run() -> None:
    seen = scene("a", "b")
    seen.places[1].down = ZeroDivisionError()
    seen.lose()
    with pytest.raises(ZeroDivisionError):
        seen.decoder()
    state = seen.supervisor.state()
    assert (state.state, state.expelled, seen.places[1].left) == ("reconnecting", {}, 0)
    seen.places[1].down = None
    assert seen.supervisor.look()
    assert seen.decoder() == "decoder 1"
    assert dialled(seen) == [1, 2]
    assert seen.supervisor.state().state == "ready"


def test_dice_make_waits_shorter_by_half_at_most() -> None:
    seen = scene("a", dice=0.0)
    seen.places[0].down = WorkerUnreachable("nobody there")
    seen.lose()
    with pytest.raises(WorkerLost):
        seen.decoder()
    assert seen.clock.waits[0] == FIRST_WAIT_S


def test_once_patience_is_over_the_next_request_begins_anew() -> None:
    seen = scene("a", patience_s=3.0)
    seen.places[0].down = WorkerUnreachable("nobody there")
    seen.lose()
    with pytest.raises(WorkerLost):
        seen.decoder()
    state = seen.supervisor.state()
    assert state.state == "failed"
    assert state.error is not None
    assert "nobody there" in state.error
    tried = dialled(seen)[0]
    with pytest.raises(WorkerLost):
        seen.decoder()
    assert dialled(seen)[0] > tried
    seen.places[0].down = None
    assert seen.decoder() == "decoder 1"
    assert seen.supervisor.state().state == "ready"


def test_patience_is_counted_from_the_last_pass_and_not_from_the_last_connection() -> None:
    """A worker that greets and dies in each pass holds nobody up for ever."""
    seen = scene("a", patience_s=10.0)

    def again_and_again() -> None:
        for _ in range(100):
            seen.lose()
            seen.decoder()

    with pytest.raises(WorkerLost, match="within 10 s"):
        again_and_again()
    assert sum(seen.clock.waits) == pytest.approx(10.0)
    assert len(seen.links.made) > 3


def test_pauses_are_counted_with_their_time() -> None:
    seen = scene("a", patience_s=10.0)
    assert (seen.supervisor.state().pauses, seen.supervisor.state().paused_s) == (0, 0.0)
    seen.places[0].down = WorkerUnreachable("nobody there")
    seen.lose()
    with pytest.raises(WorkerLost):
        seen.decoder()
    seen.clock.now += 100.0  # nobody asks, so nobody waits
    state = seen.supervisor.state()
    assert state.pauses == 1
    assert state.paused_s == pytest.approx(10.0)
    during: list[float] = []

    def back_after_a_while() -> None:
        seen.clock.now += 3.0
        during.append(seen.supervisor.state().paused_s)
        seen.places[0].down = None

    seen.places[0].prepare = back_after_a_while
    assert seen.decoder() == "decoder 1"
    seen.clock.now += 100.0
    state = seen.supervisor.state()
    assert state.pauses == 2
    assert state.paused_s == pytest.approx(13.0)
    assert during == [pytest.approx(13.0)]


def test_a_pass_ends_the_outage() -> None:
    seen = scene("a", patience_s=10.0)
    for _ in range(100):
        seen.lose()
        seen.decoder()
        seen.supervisor.passed()
    assert not seen.clock.waits


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda error: type(error).__name__)
def test_a_cheat_is_never_asked_again(cheat: ChannelError) -> None:
    seen = scene("a", "b", patience_s=5.0)
    assert seen.lose(cheat)
    assert seen.decoder() == "decoder 1"
    seen.supervisor.passed()
    seen.places[1].down = WorkerUnreachable("nobody there")
    seen.lose()
    with pytest.raises(WorkerLost):
        seen.decoder()
    assert dialled(seen)[0] == 1
    state = seen.supervisor.state()
    assert state.expelled == {"a": str(cheat)}
    assert state.failed_checks == isinstance(cheat, ProductMismatch | ReplyRangeError)


def cheat_of(worker: str) -> ProductMismatch:
    error = ProductMismatch("wrong")
    error.worker = worker
    return error


def test_a_team_goes_on_without_the_one_that_an_error_names() -> None:
    seen = scene("team", patience_s=5.0)
    for number, worker in enumerate(("x", "y"), 1):
        assert seen.lose(cheat_of(worker))
        assert seen.decoder() == f"decoder {number}"
        seen.supervisor.passed()
    assert dialled(seen) == [3]
    assert not seen.clock.waits  # the others are asked at once
    assert seen.places[0].without == ["x", "y"]
    state = seen.supervisor.state()
    assert (state.state, list(state.expelled), state.failed_checks) == ("ready", ["x", "y"], 2)
    seen.supervisor.readmit("x")
    assert seen.places[0].without == ["y"]
    assert list(seen.supervisor.state().expelled) == ["y"]


def test_a_loss_after_a_cheat_is_no_cheat() -> None:
    seen = scene("a", "b", patience_s=3.0)
    seen.lose(ProductMismatch("wrong"))
    assert seen.supervisor.state().cheated
    seen.decoder()
    assert not seen.supervisor.state().cheated  # b answers
    seen.places[1].down = WorkerUnreachable("nobody there")
    seen.lose()
    with pytest.raises(WorkerLost):
        seen.decoder()
    state = seen.supervisor.state()
    assert (state.state, state.cheated, list(state.expelled)) == ("failed", False, ["a"])


def test_where_no_team_is_left_others_are_waited_for_and_then_every_request_hears_why() -> None:
    seen = scene("team", patience_s=5.0)
    seen.lose(cheat_of("x"))
    seen.places[0].down = RosterError("the workers do not make one model; expelled: x")
    with pytest.raises(WorkerLost, match="no worker within 5 s: the workers do not make one model; expelled: x"):
        seen.decoder()
    assert (seen.supervisor.state().state, seen.supervisor.state().cheated) == ("failed", True)
    seen.places[0].down = None  # another one was started in its place
    assert seen.decoder() == "decoder 1"
    assert list(seen.supervisor.state().expelled) == ["x"]


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda error: type(error).__name__)
def test_where_all_have_cheated_every_request_hears_of_it(cheat: ChannelError) -> None:
    seen = scene("a", "b")
    assert seen.lose(ProductMismatch("an earlier one"))
    seen.decoder()
    assert not seen.lose(cheat)
    for _ in range(2):
        with pytest.raises(type(cheat)) as caught:
            seen.decoder()
        assert caught.value is cheat
        assert not seen.supervisor.look()
    assert dialled(seen) == [1, 1]
    assert seen.supervisor.state().state == "failed"
    assert not seen.clock.waits


def test_an_operator_may_admit_it_again() -> None:
    seen = scene("a")
    seen.lose(ProductMismatch("wrong"))
    with pytest.raises(ProductMismatch):
        seen.decoder()
    seen.supervisor.readmit("a")
    assert seen.decoder() == "decoder 1"
    assert seen.links.renewed == 1
    assert seen.supervisor.state().expelled == {}


def test_a_dealer_that_is_lost_is_waited_for_and_the_worker_stays() -> None:
    seen = scene("a", "b")
    lost = WorkerLost("the dealer went away")
    seen.links.made[-1].guard.bad = lost
    assert seen.lose(lost)
    assert seen.decoder() == "decoder 1"
    assert dialled(seen) == [2, 0]
    assert seen.places[0].left == 0


def test_a_dealer_that_cannot_be_had_leaves_the_worker_where_it_is() -> None:
    seen = scene("a", "b", patience_s=1.0)
    seen.places[0].down = WorkerUnreachable("nobody there", side="dealer")
    seen.lose(ChannelClosed("given up"))
    with pytest.raises(WorkerLost):
        seen.decoder()
    assert seen.places[0].left == seen.places[1].dialled == 0


def test_pads_that_fail_their_check_end_everything_and_accuse_no_worker() -> None:
    seen = scene("a", "b")
    wrong = ProductMismatch("products of pads are wrong")
    seen.links.made[-1].guard.bad = wrong
    assert not seen.lose(wrong)
    with pytest.raises(ProductMismatch) as caught:
        seen.decoder()
    assert caught.value is wrong
    state = seen.supervisor.state()
    assert (state.expelled, state.failed_checks, state.state, state.cheated) == ({}, 1, "failed", True)
    assert dialled(seen) == [1, 0]


def test_an_error_of_this_side_ends_requests_and_not_the_run() -> None:
    seen = scene("a", "b")
    assert not seen.lose(ArenaFull("no room"))
    assert seen.decoder() == "decoder 1"
    assert dialled(seen) == [2, 0]
    assert not seen.supervisor.mends(NumericError("not numbers"))


def test_a_session_that_was_given_up_here_is_made_anew_with_the_same_worker() -> None:
    seen = scene("a", "b")
    assert seen.lose(ChannelClosed("a product was given up"))
    assert seen.decoder() == "decoder 1"
    assert (dialled(seen), seen.places[0].left) == ([2, 0], 0)


def test_the_first_error_is_the_one_that_counts() -> None:
    """What fails afterwards is a consequence of it."""
    seen = scene("a")
    seen.links.made[-1].session.fail(ProductMismatch("wrong"))
    assert not seen.supervisor.mends(WorkerLost("went away"))
    assert list(seen.supervisor.state().expelled) == ["a"]


def test_without_patience_the_first_loss_ends_the_run() -> None:
    seen = scene("a", "b", patience_s=0.0)
    assert not seen.lose()
    assert seen.decoder() == "decoder 0"  # whose session says why it is over
    assert dialled(seen) == [1, 0]
    assert seen.supervisor.state().state == "failed"
    assert not seen.supervisor.look()


@pytest.mark.parametrize("error", [PathRefused(Path("/x"), "is open", "close it", unsafe=True), OSError("no process")])
def test_other_reasons_why_nobody_is_to_be_had_are_waited_for_too(error: Exception) -> None:
    seen = scene("a", "b")
    seen.places[1].down = error
    seen.lose()
    assert seen.decoder() == "decoder 1"
    assert dialled(seen) == [2, 1]


def test_what_is_wrong_with_the_model_is_raised_at_once() -> None:
    seen = scene("a")

    def changed(stopped: Callable[[], bool]) -> None:
        raise CorruptCheckpoint("the weights have changed")

    seen.links.renews = changed
    seen.lose()
    with pytest.raises(CorruptCheckpoint):
        seen.decoder()


def test_a_link_that_fails_while_it_is_made_ready_is_closed_and_judged() -> None:
    seen = scene("a", "b")

    def fail(link: Any) -> None:
        if link.session.address == "b":
            error = ProductMismatch("wrong")
            link.session.fail(error)
            raise error

    seen.links.resumes = fail
    seen.lose()
    assert seen.decoder() == "decoder 2"
    assert [link.closed for link in seen.links.made] == [1, 1, 0]
    assert list(seen.supervisor.state().expelled) == ["b"]


def test_a_worker_that_has_gone_is_seen_before_it_is_asked() -> None:
    seen = scene("a")
    seen.places[0].has_gone = True
    assert seen.supervisor.look()
    assert isinstance(seen.links.made[0].session.ended, WorkerLost)
    seen.places[0].has_gone = False
    assert seen.decoder() == "decoder 1"
    assert not seen.supervisor.look()


def test_closing_ends_a_wait_for_a_worker_that_does_not_answer() -> None:
    """Who waits hears of it at once; what comes of the attempt later is closed."""
    seen = scene("a", patience_s=1e6)
    dials, answers, interrupted = threading.Event(), threading.Event(), threading.Event()
    late: list[Any] = []

    def connect(dial: Any, until: Until) -> Any:
        dials.set()
        answers.wait(LIMIT_S)
        late.append(FakeLinks().connect(dial, until))
        return late[0]

    seen.places[0].interrupt = interrupted.set
    seen.links.connect = connect  # type: ignore[method-assign]
    seen.lose()
    raised: list[Exception] = []

    def wait() -> None:
        try:
            seen.decoder()
        except ChannelClosed as error:
            raised.append(error)

    waits = threading.Thread(target=wait)
    waits.start()
    assert dials.wait(LIMIT_S)
    seen.supervisor.stop()
    waits.join(LIMIT_S)
    assert raised
    assert interrupted.is_set()
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "tsqp-connect":
            thread.join(LIMIT_S)
    assert late[0].closed == 1
    seen.supervisor.close()
    assert seen.places[0].closed == 1


def test_closing_ends_what_the_next_link_is_made_of() -> None:
    """Weights that are read again take long: whoever reads them asks whether that is still wanted."""
    seen = scene("a")
    reads, raised = threading.Event(), list[Exception]()

    def read(stopped: Callable[[], bool]) -> None:
        while not stopped():
            reads.set()
        raise ChannelClosed("the model was closed")

    def wait() -> None:
        try:
            seen.decoder()
        except ChannelClosed as error:
            raised.append(error)

    seen.links.renews = read
    seen.lose()
    waits = threading.Thread(target=wait)
    waits.start()
    assert reads.wait(LIMIT_S)
    seen.supervisor.close()
    waits.join(LIMIT_S)
    assert raised
    assert (len(seen.links.made), dialled(seen)) == (1, [1])


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What is free is so because nothing refers to it: a server that has nothing to do collects nothing."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_a_lost_link_is_gone_once_the_next_one_is_there() -> None:
    """It holds shared memory, also where attempts have failed and where one error was raised in place of another."""
    seen = scene("a")
    refusals = iter([WorkerUnreachable("nobody answered"), WorkerLost("went away")])
    connect: Any = seen.links.connect

    def refused_at_first(dial: Any, until: Until) -> Any:
        for error in refusals:
            raise error
        return connect(dial, until)

    def a_pass(link: Any) -> None:
        try:
            raise BrokenPipeError
        except OSError:
            link.session.fail(error := WorkerLost("went away"))
            raise error from None

    seen.links.connect = refused_at_first  # type: ignore[method-assign]
    lost = weakref.ref(seen.links.made[0])
    try:
        a_pass(seen.links.made.pop())
    except WorkerLost as error:
        mends = seen.supervisor.mends(error)
    assert mends
    assert seen.decoder() == "decoder 0"
    assert lost() is None


def test_closing_closes_the_link_and_every_place_and_no_other_is_made() -> None:
    seen = scene("a", "b")
    seen.supervisor.close()
    seen.supervisor.close()
    assert seen.links.made[0].closed >= 1
    assert all(place.closed for place in seen.places)
    seen.lose()
    with pytest.raises(ChannelClosed):
        seen.decoder()
    assert len(seen.links.made) == 1


def test_at_the_start_each_place_is_tried_once() -> None:
    seen = scene("a")
    seen.supervisor._places = places = [FakePlace("x", WorkerUnreachable("no x")), FakePlace("y")]
    told: list[str] = []
    assert seen.supervisor.open(lambda what, done=0, total=0: told.append(what)).session.address == "y"
    assert told == ["waiting for x", "waiting for y"]
    places[1].down = WorkerUnreachable("no y")
    with pytest.raises(WorkerUnreachable, match="no y"):
        seen.supervisor.open()
    assert [place.dialled for place in places] == [2, 2]


def test_one_line_for_each_event(caplog: pytest.LogCaptureFixture) -> None:
    seen = scene("a", "b")
    with caplog.at_level(logging.INFO, "tsqp.workers"):
        seen.lose()
        seen.decoder()
        seen.lose(ProductMismatch("wrong"))
        seen.decoder()
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "ERROR", "INFO"]
    assert "worker b is expelled: wrong" in caplog.text
