"""Where a worker is to be had: at an address, or started beside this process, as often as one is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

from tsqp.api.until import Until
from tsqp.config.shard import Shard
from tsqp.errors import ChannelError, WorkerLost, WorkerUnreachable, model_closed
from tsqp.launch.local import LocalWorker
from tsqp.wire.channel import Channel

Dial = Callable[[str, int | None], Channel]  # an address, and the process there if it was started here


class Dialled(NamedTuple):
    """A worker that was reached. ``shard``: what it holds, where several hold a model together; ``name``: its own."""

    channel: Channel
    shard: Shard | None = None
    name: str = ""


class Place(Protocol):
    """One worker, or one after another that count as the same; or a team. ``name``: what an operator knows it by."""

    name: str

    def prepare(self) -> None:
        """Begin what takes long, and do not wait for it. Raises OSError."""

    def dial(self, until: Until) -> Sequence[Dialled]:
        """A channel to the worker, or to each of a team's workers. Raises ChannelError.

        ``until`` bounds how long a team is dialled; a worker alone has bounds of its own.
        """

    def settled(self) -> None:
        """There is a session with the worker. Raises OSError."""

    def gone(self) -> bool:
        """Whether the worker is known to have ended."""

    def explained(self, error: ChannelError) -> ChannelError:
        """The error, or a better one where more is known."""

    def leave(self) -> None:
        """Its session is over: whatever is left of the worker there is of no use."""

    def expel(self, worker: str | None) -> str:
        """The worker of this name has cheated, or an unknown one of this place for None.

        Returns the name of what nothing is asked of any more: that worker, or the whole place.
        """

    def readmit(self, name: str) -> None:
        """Whoever was expelled by this name may be asked again."""

    def interrupt(self) -> None:
        """Whoever waits in ``dial`` waits no longer, as far as that can be had. Another thread may call it."""

    def close(self) -> None:
        """Leave for good. Closing twice is allowed."""


class RunElsewhere:
    """What a place need not do where somebody else runs the workers: see Place."""

    def prepare(self) -> None:
        """See Place."""

    def settled(self) -> None:
        """See Place."""

    def gone(self) -> bool:
        """See Place: that shows when it is called."""
        return False

    def explained(self, error: ChannelError) -> ChannelError:
        """See Place."""
        return error

    def leave(self) -> None:
        """See Place."""

    def interrupt(self) -> None:
        """See Place: what is waited for is bounded."""

    def close(self) -> None:
        """See Place."""


class Standing(RunElsewhere):
    """A worker that somebody else runs, at an address."""

    def __init__(self, address: str, dial: Dial) -> None:
        self.name = address
        self._dial = dial

    def dial(self, until: Until) -> Sequence[Dialled]:
        """See Place."""
        return [Dialled(self._dial(self.name, None))]

    def expel(self, worker: str | None) -> str:
        """See Place: there is one worker, whoever it is."""
        return self.name

    def readmit(self, name: str) -> None:
        """See Place."""


class StartedHere:
    """A worker process of this one. After a loss it is ended, whatever state it is in, and the next one is started.

    ``spare``: the next one is started beforehand, and waits.
    """

    name = "started here"

    def __init__(self, start: Callable[[], LocalWorker], dial: Dial, *, spare: bool = False) -> None:
        self._start = start
        self._dial = dial
        self._keeps_spare = spare
        self._worker: LocalWorker | None = None
        self._spare: LocalWorker | None = None
        self._closed = False
        self._lock = threading.Lock()  # of the two: no process may be started once all were to end

    @property
    def pid(self) -> int | None:
        """The process id of the worker, None between two of them."""
        worker = self._worker
        return None if worker is None else worker.pid

    def prepare(self) -> None:
        """See Place: a process. Raises ChannelClosed after ``close``."""
        self._started()

    def dial(self, until: Until) -> Sequence[Dialled]:
        """See Place; the worker may still be loading."""
        worker = self._started()
        address = worker.wait_ready()
        try:
            return [Dialled(self._dial(address, worker.pid))]
        except WorkerUnreachable as error:
            raise self.explained(error) from None

    def settled(self) -> None:
        """See Place: now there is time to start the next one."""
        with self._lock:
            if self._keeps_spare and self._spare is None and not self._closed:
                self._spare = self._start()

    def gone(self) -> bool:
        """See Place."""
        worker = self._worker
        return worker is not None and worker.ended

    def explained(self, error: ChannelError) -> ChannelError:
        """See Place: a worker that has ended can say how, and is nobody's to start again."""
        worker = self._worker
        if worker is None or not isinstance(error, WorkerLost | WorkerUnreachable) or error.side == "dealer":
            return error
        if isinstance(error, WorkerUnreachable) and not worker.listens:
            return error  # of its start, which says how it ended
        words = worker.last_words()  # it may be ending: this waits a moment
        if not worker.ended:
            return error  # what was wrong is something else
        return WorkerLost(f"that was started here went away: {words}", address=worker.address)

    def leave(self) -> None:
        """See Place."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.close()

    def expel(self, worker: str | None) -> str:
        """See Place: there is one worker, whoever it is."""
        return self.name

    def readmit(self, name: str) -> None:
        """See Place."""

    def interrupt(self) -> None:
        """See Place: what is being waited for ends."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def close(self) -> None:
        """See Place: politely."""
        with self._lock:
            self._closed = True
            workers = [worker for worker in (self._worker, self._spare) if worker is not None]
        with ExitStack() as closing:
            for worker in workers:
                closing.callback(worker.close)
        self._worker = self._spare = None  # only now: who cannot wait for the end has to know whom to kill

    def _started(self) -> LocalWorker:
        with self._lock:
            if self._closed:
                raise model_closed()
            if self._worker is None and self._spare is not None and self._spare.ended:
                self._spare.close()
                self._spare = None
            if self._worker is None:
                self._worker, self._spare = self._spare or self._start(), None
            return self._worker
