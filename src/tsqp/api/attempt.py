"""A connection that is made while somebody waits for it who may have to go."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tsqp.api.links import Link
from tsqp.errors import ChannelClosed, model_closed


class Attempt:
    """A link that is made by a thread of its own, so that nobody has to wait for a worker that does not answer."""

    def __init__(self, connect: Callable[[], Link]) -> None:
        self._connect = connect
        self._made: Link | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._run, name="tsqp-connect", daemon=True).start()

    def link(self, stop: threading.Event) -> Link:
        """Wait for it. Raises what ``connect`` raises; ChannelClosed soon after ``stop``."""
        try:
            self.wait(stop)
        except BaseException:
            with self._lock:
                self._abandoned, made = True, self._made
            if made is not None:
                made.close()
            raise
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its frames have this one, which would have it, and none of them would ever go
        if self._made is None:
            raise ChannelClosed("the attempt was given up")
        return self._made

    def wait(self, stop: threading.Event) -> None:
        """Until it is over, whatever has come of it. Raises ChannelClosed soon after ``stop``."""
        while not self._over.wait(0.05):
            if stop.is_set():
                raise model_closed()

    def _run(self) -> None:
        try:
            link = self._connect()
            with self._lock:
                self._made, abandoned = link, self._abandoned
            if abandoned:
                link.close()
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()
