"""A conversation in a pipe, whose reader is in the middle of waiting for a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.commands import LIMIT_S

ROOT = Path(__file__).parents[2]

READER = """
import asyncio, signal, sys
from rich.console import Console
from tsqp.cli.terminal import Lines

class Input:
    def readline(self):
        print("waits", flush=True)
        return real.readline()

async def talk():
    assert await Lines(Console(stderr=True)).read() == "first\\n"
    await Lines(Console(stderr=True)).read()

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell, whatever started this
real, sys.stdin = sys.stdin, Input()
try:
    asyncio.run(talk())
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_one_interrupt_ends_who_waits_for_a_line() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("first\n")
        process.stdin.flush()
        for _ in range(2):
            assert process.stdout.readline() == "waits\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
