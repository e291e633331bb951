"""Which worker is asked, and what becomes of a run whose worker is lost or cheats.

A lost worker costs a pause: the next link is made at the next place in turn, with growing waits between the rounds, for
as long as patience lasts. A worker whose product has failed its check, or that breaks the protocol, is expelled:
nothing is asked of it again until ``readmit``. Of several workers that hold a model together it is the one that an
error names, and the others go on where somebody holds its part. ``docs/serving.md`` §9 says what counts as what.

Covers: a place that was expelled is never dialled again (tests/api/test_supervisor.py); no link outlives its end (same
file). Does not cover: one party with two addresses. Assumes: errors name what happened.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from tsqp.api.attempt import Attempt
from tsqp.api.freed_memory import give_back_freed_memory
from tsqp.api.links import Link, Links
from tsqp.api.places import Place
from tsqp.api.until import Until
from tsqp.api.worker_state import WorkerState
from tsqp.errors import (
    ChannelClosed,
    ChannelError,
    CheckFailed,
    DeadlineExceeded,
    PathRefused,
    ProtocolError,
    TsqpError,
    WorkerFailed,
    WorkerLost,
    WorkerUnreachable,
    forget_frames,
    model_closed,
)
from tsqp.progress import Progress, unseen
from tsqp.trusted.engine.line import PassDecoder

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0  # between two rounds of all places; each wait is twice the one before

CHEATS = (CheckFailed, ProtocolError)
LOST = (WorkerLost, WorkerUnreachable, WorkerFailed, DeadlineExceeded, ChannelClosed)
TRIED_AGAIN = (ChannelError, PathRefused, OSError)  # of an attempt to connect

log = logging.getLogger("tsqp.workers")


class Supervisor:
    """See Line. ``places`` are asked in turn; with a patience of 0 only the first link there is to be had is used.
    ``dealers``: where several dealers are to be had, which the links dial; None where there is one, or none.

    ``clock`` in seconds; ``dice`` gives 0 to 1; ``wait`` waits so many seconds, and says whether ``stop`` was called.
    """

    def __init__(
        self,
        places: Sequence[Place],
        links: Links,
        patience_s: float,
        *,
        dealers: Place | None = None,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._places = places
        self._dealers = dealers
        self._links = links
        self._patience_s = patience_s
        self._clock = clock
        self._dice = dice
        self._turn = 0  # of the place in use, or to be tried next
        self._link: Link | None = None
        self._judged: Link | None = None  # whose end is in the books
        self._left: list[Place] = []  # to be left before the next link
        self._expelled: dict[str, ChannelError] = {}
        self._broken_pads: ChannelError | None = None  # what has ended the making of pads for good
        self._lost_at: float | None = None  # since no pass was completed
        self._given_up = self._mending = False
        self._error: str | None = None
        self._cheated = False  # whether the last session ended by a cheat
        self._tried = 0  # connections since the loss
        self._losses = self._reconnects = self._failed_checks = self._pauses = 0
        self._paused_since: float | None = None
        self._paused_s = 0.0  # in pauses that are over
        self._since = clock()
        self._attempt: Attempt | None = None  # the last one
        self._stop = threading.Event()
        self._endless = Until(None, self._stop.is_set)
        self._wait = wait or self._stop.wait
        self._lock = threading.Lock()  # of the link, and whether there is to be one
        self._at_work = threading.Lock()  # held while a worker is waited for

    def open(self, progress: Progress = unseen) -> Link:
        """The first link; ``progress`` is told who is waited for.

        Raises what the last place has to say, where none is to be had.
        """
        for number, place in enumerate(self._places):
            self._turn = number
            progress(f"waiting for {place.name}")
            try:
                link = self._adopt(self._links.connect(place.dial, self._endless))
                place.settled()
                return link
            except ChannelError as error:
                told = place.explained(error)
                place.leave()
                if number == len(self._places) - 1:
                    raise told from None
                log.warning("worker %s cannot be had: %s", place.name, told, extra={"event": "worker_unreachable"})
        raise ChannelClosed("no worker was named")

    @property
    def link(self) -> Link | None:
        """The last one that there was, which may have ended; None while there is none."""
        return self._link

    def products_checked(self) -> int:
        """How many, over this link and those before; 0 while there is none."""
        guard = None if self._link is None else self._link.guard
        return 0 if guard is None else guard.counted()["products_checked"]

    def decoder(self) -> PassDecoder:
        """See Line. Raises ChannelError, CheckpointError and PadError."""
        link = self._link
        if link is not None and ((link.ended is None and not self._mending) or not self._patience_s):
            return link.decoder  # at a patience of 0 its every pass raises what has ended it
        self._endless.raise_if_stopped()
        if link is not None and link.ended is not None:
            self._judge(link, link.ended)
        self._mending = True  # until it is done: an interrupt leaves a link that is not ready
        with self._at_work:
            try:
                link = self._mended()
            finally:
                self._end_pause()
        self._mending = False
        return link.decoder

    def look(self) -> bool:
        """See Line: only a worker that was started here is seen to have ended before it is asked for something."""
        link, place = self._link, self._place
        if not self._patience_s or self._verdict() is not None:
            return False
        if link is not None and place.gone():
            link.session.fail(WorkerLost("went away; start it again and connect anew", address=link.session.address))
        return link is None or link.ended is not None

    def passed(self) -> None:
        """See Line."""
        if self._lost_at is not None:
            self._lost_at, self._tried = None, 0
            give_back_freed_memory()  # of the link before: nobody has its decoder any more

    def gave_up(self, error: BaseException) -> None:
        """See Line: a session that checks is over then, as after any failure between a call and its product."""
        link = self._link
        if link is not None and link.guard is not None and link.guard.linears.under_way:
            link.guard.linears.end(error)

    def mends(self, error: Exception) -> bool:
        """See Line: after a loss, and after a cheat where somebody else can be asked."""
        link = self._link
        if link is None or not isinstance(error, ChannelError):
            return False
        first = link.ended or error
        self._judge(link, first)
        return bool(self._patience_s) and isinstance(first, LOST + CHEATS) and self._verdict() is None

    def explained(self, error: ChannelError) -> ChannelError:
        """The error, or a better one where more is known."""
        return self._place.explained(error)

    def state(self) -> WorkerState:
        """How it is now. Any thread may ask."""
        link, verdict, paused_since = self._link, self._verdict(), self._paused_since
        ready = link is not None and link.ended is None and not self._mending
        failed = verdict is not None or self._given_up or (not ready and not self._patience_s)
        error = None if ready else (self._error if verdict is None else str(verdict))
        return WorkerState(
            "ready" if ready else "failed" if failed else "reconnecting",
            self._clock() - self._since,
            self._place.name if link is None else link.session.address,
            self._losses,
            self._reconnects,
            self._pauses,
            self._paused_s + (0.0 if paused_since is None else self._clock() - paused_since),
            self._failed_checks,
            {name: str(reason) for name, reason in list(self._expelled.items())},
            error,
            not ready and self._cheated,
        )

    def readmit(self, name: str) -> None:
        """An operator says that a worker may be asked again: a new guess at new secrets for whoever is there."""
        if self._expelled.pop(name, None) is not None:
            for place in [*self._places, *([] if self._dealers is None else [self._dealers])]:
                place.readmit(name)
            log.warning("worker %s is admitted again", name, extra={"event": "worker_readmitted"})

    def stop(self) -> None:
        """Whoever waits for a worker waits no longer, and no further link is made. Any thread may call it."""
        self._stop.set()
        if self._link is None:
            self._place.interrupt()

    def close(self) -> None:
        """End the link, and every place. Closing twice is allowed."""
        self.stop()
        with self._at_work, self._lock:  # soon: whoever waits has been told
            link = self._link
        try:
            if link is not None:
                link.close()
        finally:
            for place in self._places:
                place.close()

    @property
    def _place(self) -> Place:
        return self._places[self._turn]

    def _judge(self, link: Link, error: ChannelError) -> None:
        """Once for each link: what its end means for whoever was at the other end."""
        if link is self._judged:
            return
        self._judged = link
        place = self._place
        of_pads = link.guard is not None and link.guard.failed_pads(error)
        self._since, self._given_up = self._clock(), False
        self._failed_checks += isinstance(error, CheckFailed)
        self._cheated = isinstance(error, CHEATS)
        if of_pads and self._cheated:
            self._judge_pads(error)
        elif self._cheated:
            name = place.expel(error.worker)
            self._expelled[name] = error
            self._left.append(place)
            log.error("worker %s is expelled: %s", name, error, extra={"event": "worker_expelled"})
        else:
            self._losses += 1
            self._lost_at = self._clock() if self._lost_at is None else self._lost_at
            if not of_pads and isinstance(error, LOST):
                error = place.explained(error)
                if not isinstance(error, ChannelClosed):  # given up on this side, by an interrupt: the worker is well
                    self._left.append(place)
            text = "%s; another worker is waited for, at most %g s"
            log.warning(text, error, self._patience_s, extra={"event": "worker_lost"})
        self._error = str(error)

    def _judge_pads(self, error: ChannelError) -> None:
        """A dealer has cheated, or this machine is broken."""
        dealers = self._dealers
        name = None if dealers is None else dealers.expel(error.worker)
        if dealers is None or name is None or name == dealers.name:
            self._broken_pads = error  # nobody else makes pads
            text = "no more pads are made, and nothing more is asked: %s"
            log.error(text, error, extra={"event": "pads_broken"})
        else:
            self._expelled[name] = error
            log.error("dealer %s is expelled: %s", name, error, extra={"event": "dealer_expelled"})

    def _begin_pause(self) -> None:
        """Somebody waits for a worker."""
        if self._paused_since is None:
            self._pauses += 1
            self._paused_since = self._clock()

    def _end_pause(self) -> None:
        """There is a worker, or nobody waits any longer."""
        since, self._paused_since = self._paused_since, None
        if since is not None:
            self._paused_s += self._clock() - since

    def _verdict(self) -> ChannelError | None:
        """Why nobody is left to ask; None where somebody is."""
        if self._broken_pads is not None:
            return self._broken_pads
        names = [place.name for place in self._places]
        if any(name not in self._expelled for name in names):
            return None
        return [error for name, error in self._expelled.items() if name in names][-1]

    def _next_turn(self) -> None:
        """The next place that was not expelled, if there is one."""
        for _ in self._places:
            self._turn = (self._turn + 1) % len(self._places)
            if self._place.name not in self._expelled:
                return

    def _mended(self) -> Link:
        """A new link. Raises the verdict, what ends the run, and WorkerLost once patience is over."""
        self._given_up = False  # whoever asks waits again
        self._end_link()
        while True:
            self._endless.raise_if_stopped()
            self._leave()
            verdict = self._verdict()
            if verdict is not None:
                forget_frames(verdict)  # of the pass that failed
                raise verdict
            self._begin_pause()
            if self._lost_at is None:  # after a failed check, or after giving up
                self._lost_at = self._clock()
            left_s = self._lost_at + self._patience_s - self._clock()
            if left_s <= 0:
                raise self._gave_up()
            wait_s = min(left_s, self._wait_s())
            if self._wait(wait_s) or wait_s == left_s:
                continue
            self._tried += 1
            try:
                return self._connected(left_s - wait_s)
            except TRIED_AGAIN as error:
                self._failed(error)

    def _leave(self) -> None:
        """Nothing more is asked of who was lost or has cheated: it is another's turn."""
        for place in self._left:
            place.leave()
        if self._place in self._left or self._place.name in self._expelled:
            self._next_turn()
        self._left.clear()

    def _wait_s(self) -> float:
        """0 in the first round; then seconds that grow, the same for no two runs."""
        rounds = self._tried // len([place for place in self._places if place.name not in self._expelled])
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**rounds) * (0.5 + self._dice() / 2) if rounds else 0.0

    def _connected(self, within_s: float) -> Link:
        """One attempt, at the place whose turn it is; see ``Links.connect`` for what ``within_s`` bounds."""
        if self._attempt is not None:
            self._attempt.wait(self._stop)  # an interrupt may have left it, and two would share what links are made of
        place = self._place
        place.prepare()
        self._links.renew(self._stop.is_set)  # while a worker that was started loads
        self._attempt = Attempt(lambda: self._links.connect(place.dial, Until(within_s, self._stop.is_set)))
        link = self._adopt(self._attempt.link(self._stop))
        self._links.resume(link, self._stop.is_set)
        with suppress(OSError):  # the session is there; a spare may come another time
            place.settled()
        self._reconnects += 1
        after_s = self._clock() - self._since
        log.info("worker %s is there, after %.1f s", place.name, after_s, extra={"event": "worker_back"})
        self._since = self._clock()
        return link

    def _failed(self, error: Exception) -> None:
        """An attempt has failed: the next one is somewhere else, if there is somewhere else."""
        link = self._link
        if link is not None:  # while it was made ready
            self._judge(link, link.ended or (error if isinstance(error, ChannelError) else ChannelClosed(str(error))))
            self._end_link()
            return
        place = self._place
        self._error = str(place.explained(error) if isinstance(error, ChannelError) else error)
        if not (isinstance(error, ChannelError) and error.side == "dealer"):
            place.leave()
            self._next_turn()
        log.info("worker %s cannot be had: %s", place.name, self._error, extra={"event": "worker_unreachable"})

    def _gave_up(self) -> TsqpError:
        """Patience is over. Whatever is asked next begins anew."""
        self._given_up, self._lost_at, self._tried, self._since = True, None, 0, self._clock()
        error = WorkerLost(f"no worker within {self._patience_s:g} s: {self._error}")
        log.error("%s; all requests end", error, extra={"event": "patience_over"})
        return error

    def _adopt(self, link: Link) -> Link:
        with self._lock:
            if not self._stop.is_set():
                self._link = link
                return link
        link.close()
        raise model_closed()

    def _end_link(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()
            self._judged = None
            forget_frames(link.ended)  # which would keep the memory of the connection
            give_back_freed_memory()  # of its pads, before others are made
