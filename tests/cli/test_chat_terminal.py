"""``tsqp chat`` on a real terminal: a process behind a pseudoterminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import time
from collections.abc import Iterator

import pytest

from tests.commands import LIMIT_S, TSQP, Home
from tests.server.chat_model import chat_model

pytestmark = pytest.mark.slow  # a process that loads a model, and waits for keys

CTRL_C, CTRL_D = b"\x03", b"\x04"
READS, HAS_READ = rb"\x1b\[\?2004h", rb"\x1b\[\?2004l"  # pasting in brackets, while keys are awaited
OPTIONS = ("--protection", "local", "--dtype", "float32", "--threads", "1", "--ignore-eos", "-n", "1900")


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


@contextlib.contextmanager
def chat(home: Home) -> Iterator[tuple[Screen, int]]:
    pid, descriptor = pty.fork()
    if pid == 0:
        command = [*TSQP, "chat", "--model", str(chat_model()), *OPTIONS]
        os.execve(command[0], command, {**home.environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"})
    try:
        yield Screen(descriptor), pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(descriptor)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(home: Home) -> None:
    chat_model()  # made here and not in the child
    with chat(home) as (screen, pid):
        screen.until(rb"/help says")
        screen.until(READS)
        screen.type(b"hello\r")
        screen.until(HAS_READ)
        screen.until(rb".{40}")  # an answer has begun
        screen.type(CTRL_C)
        screen.until(rb"stopped")
        screen.until(READS)
        screen.type(b"/stats\r")
        found = screen.until(rb"prompt of (\d+) tokens, (\d+) of them kept from before; answer of (\d+)")
        assert 0 < int(found[3]) < 1900
        screen.until(READS)
        screen.type(CTRL_C)
        screen.until(rb"Ctrl-D or /exit ends the chat")
        screen.until(READS)
        screen.type(CTRL_D)
        screen.until(HAS_READ)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
