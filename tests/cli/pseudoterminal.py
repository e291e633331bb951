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

from tests.commands import LIMIT_S

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Screen:
    """Keys for a process, and what it shows."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
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
            if select.select([self._descriptor], [], [], 1.0)[0]:
                with contextlib.suppress(OSError):  # the process has ended
                    self.shown += os.read(self._descriptor, 1 << 16)
        raise AssertionError(f"{pattern!r} was not shown: {self.shown[-2000:]!r}")

    def rest(self) -> bytes:
        """All that is shown until the process ends, after what was waited for before."""
        with contextlib.suppress(OSError):
            while piece := os.read(self._descriptor, 1 << 16):
                self.shown += piece
        return self.shown[self._read :]


@contextlib.contextmanager
def behind_terminal(
    command: Sequence[str], environment: Mapping[str, str], *, output: int | None = None
) -> Iterator[tuple[Screen, int]]:
    """A process and its id; ``output``: where its standard output goes in place of the terminal."""
    pid, descriptor = pty.fork()
    if pid == 0:
        if output is not None:
            os.dup2(output, 1)
        os.execve(command[0], list(command), {**environment, "TERM": "xterm"})
    try:
        yield Screen(descriptor), pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(descriptor)
