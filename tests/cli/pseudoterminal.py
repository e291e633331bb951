"""A process behind a pseudoterminal: keys for it, and what it shows."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence

from tests.commands import LIMIT_S, heed_ctrl_c

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Screen:
    """Keys for a process, and what it shows."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self._pid = pid
        self._descriptor = descriptor
        self._status: int | None = None  # once the process has ended and is no more
        self.shown = b""
        self._read = 0

    def type(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def until(self, pattern: bytes) -> re.Match[bytes]:
        """Wait for something to be shown after what was waited for before."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            found = re.compile(pattern, re.DOTALL).search(self.shown, self._read)
            if found is not None:
                self._read = found.end()
                return found
            self._look()
        raise AssertionError(f"{pattern!r} was not shown: {self.shown[-2000:]!r}")

    def rest(self) -> bytes:
        """All that is shown until the process ends, after what was waited for before."""
        end = time.monotonic() + LIMIT_S
        while self._look():
            assert time.monotonic() < end, f"it goes on: {self.shown[-2000:]!r}"
        return self.shown[self._read :]

    def ended(self) -> int:
        """Wait for the process to end. Returns its exit code."""
        if self._status is None:
            self._status = os.waitpid(self._pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)

    def kill(self) -> None:
        """End the process, unless it has ended: its number may be another's by now."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            self.ended()

    def _look(self) -> bool:
        """Take what is shown within a second. Returns whether more can come."""
        if not select.select([self._descriptor], [], [], 1.0)[0]:
            return True
        try:
            piece = os.read(self._descriptor, 1 << 16)
        except OSError:  # the process has ended
            return False
        self.shown += piece
        return bool(piece)


@contextlib.contextmanager
def behind_terminal(
    command: Sequence[str], environment: Mapping[str, str], *, output: int | None = None
) -> Iterator[Screen]:
    """A process; ``output``: where its standard output goes in place of the terminal."""
    pid, descriptor = pty.fork()
    if pid == 0:
        heed_ctrl_c()
        if output is not None:
            os.dup2(output, 1)
        os.execve(command[0], list(command), {**environment, "TERM": "xterm"})
    screen = Screen(pid, descriptor)
    try:
        yield screen
    finally:
        screen.kill()
        os.close(descriptor)
