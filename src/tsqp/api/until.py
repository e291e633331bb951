"""How long somebody is waited for."""

from __future__ import annotations

from collections.abc import Callable

from tsqp.errors import model_closed
from tsqp.wire.transport.base import Deadline

Stopped = Callable[[], bool]


def never() -> bool:
    """For who cannot be stopped."""
    return False


class Until:
    """At most so many seconds from now, or without an end for None; and not after ``stopped``."""

    def __init__(self, seconds: float | None = None, stopped: Stopped = never) -> None:
        self.stopped = stopped
        self._seconds = seconds
        self._deadline = Deadline(seconds)

    @property
    def passed(self) -> bool:
        """Whether the seconds are over."""
        return self._deadline.passed

    def left_s(self, otherwise: float) -> float:
        """The seconds that are left, 0 at least; ``otherwise`` where there is no end."""
        return otherwise if self._seconds is None else self._deadline.remaining_s

    def within(self, seconds: float) -> Until:
        """The same, and at most so many seconds from now."""
        return Until(min(seconds, self.left_s(seconds)), self.stopped)

    def again(self) -> Until:
        """As long as it was at first, from now on."""
        return Until(self._seconds, self.stopped)

    def raise_if_stopped(self) -> None:
        """Raises ChannelClosed."""
        if self.stopped():
            raise model_closed()
