"""Links and places without processes: what a supervisor does with them can be seen, and its time is ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tsqp.api.supervisor import Supervisor
from tsqp.api.until import Until
from tsqp.errors import ChannelError, WorkerLost


class Clock:
    """Seconds that pass when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        if seconds:
            self.waits.append(seconds)
        self.now += seconds
        return False


class FakeSession:
    def __init__(self, address: str) -> None:
        self.address = address
        self.ended: ChannelError | None = None

    def fail(self, error: ChannelError) -> None:
        self.ended = self.ended or error


@dataclass
class FakeGuard:
    """``bad``: what has ended the making of pads."""

    bad: ChannelError | None = None

    def failed_pads(self, error: Exception) -> bool:
        return error is self.bad


class FakeLink:
    def __init__(self, address: str, number: int) -> None:
        self.session = FakeSession(address)
        self.decoder = f"decoder {number}"
        self.guard = FakeGuard()
        self.closed = 0

    @property
    def ended(self) -> ChannelError | None:
        return self.session.ended

    def close(self) -> None:
        self.closed += 1


@dataclass
class FakePlace:
    """``down``: dialling raises this."""

    name: str
    down: Exception | None = None
    dialled: int = 0
    left: int = 0
    closed: int = 0
    has_gone: bool = False
    prepare: Callable[[], None] = lambda: None
    interrupt: Callable[[], None] = lambda: None
    sessions: int = 0
    without: list[str] = field(default_factory=list)  # workers that were expelled by a name of their own

    def dial(self, until: Until) -> Any:
        self.dialled += 1
        if self.down is not None:
            raise self.down
        return self.name

    def settled(self) -> None:
        self.sessions += 1

    def gone(self) -> bool:
        return self.has_gone

    def explained(self, error: ChannelError) -> ChannelError:
        return error

    def leave(self) -> None:
        self.left += 1

    def expel(self, worker: str | None) -> str:
        if worker is None:
            return self.name
        self.without.append(worker)
        return worker

    def readmit(self, name: str) -> None:
        self.without = [one for one in self.without if one != name]

    def close(self) -> None:
        self.closed += 1


@dataclass
class FakeLinks:
    """``renews`` is called by ``renew``, and ``resumes`` with each link that is resumed."""

    made: list[FakeLink] = field(default_factory=list)
    renewed: int = 0
    within: list[float] = field(default_factory=list)  # seconds that each attempt was given
    untils: list[Until] = field(default_factory=list)
    renews: Callable[[Callable[[], bool]], None] = lambda stopped: None
    resumes: Callable[[Any], None] = lambda link: None

    def renew(self, stopped: Callable[[], bool]) -> None:
        self.renewed += 1
        self.renews(stopped)

    def connect(self, dial: Callable[[Until], Any], until: Until) -> Any:
        self.within.append(until.left_s(math.inf))
        self.untils.append(until)
        self.made.append(FakeLink(dial(until), len(self.made)))
        return self.made[-1]

    def resume(self, link: Any, stopped: Callable[[], bool]) -> None:
        self.resumes(link)


@dataclass
class Scene:
    """A supervisor of some places, opened, and what it deals with."""

    supervisor: Supervisor
    places: list[FakePlace]
    links: FakeLinks
    clock: Clock

    def decoder(self) -> Any:
        """What the engine would go on with."""
        return self.supervisor.decoder()

    def lose(self, error: ChannelError | None = None) -> bool:
        """A pass fails; whether it may be asked again."""
        link = self.links.made[-1]
        error = error or WorkerLost("went away")
        link.session.fail(error)
        return self.supervisor.mends(error)


def scene(*names: str, patience_s: float = 60.0, dice: float = 1.0) -> Scene:
    """By default waits are as long as they may be."""
    clock, links, places = Clock(), FakeLinks(), [FakePlace(name) for name in names]
    supervisor = Supervisor(places, links, patience_s, clock=clock, dice=lambda: dice, wait=clock.wait)
    supervisor.open()
    return Scene(supervisor, places, links, clock)
