"""What takes long, on a real terminal: a process behind a pseudoterminal, whose loader is slow and does no work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cli.pseudoterminal import CTRL_C, Screen, behind_terminal
from tests.commands import Home

# The digest is there once a line is typed. What is shown is not waited for, unless the test says so. It looks for the
# line again and again: a signal that comes just before a read that waits would be seen only after the read.
SLOW = """
import select
import sys
import tsqp.cli.models, tsqp.progress_bar
from tsqp.cli.main import main

def slow(checkpoint, lora, progress):
    progress("reading", 3, 7)
    print("begun", file=sys.stderr)
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
    sys.stdin.readline()
    return "the digest"

tsqp.cli.models._digest = slow
tsqp.progress_bar.QUIET_S = float(sys.argv.pop(1))
main()
"""
SHOWN = rb"reading [^\r\n]*3 of 7"
HIDDEN, VISIBLE, EMPTY_LINE = b"\x1b[?25l", b"\x1b[?25h", b"\x1b[2K"
AT_ONCE, NEVER = "0", "1000"


@contextmanager
def info(home: Home, quiet_s: str, *options: str, output: int | None = None) -> Iterator[Screen]:
    command = [sys.executable, "-c", SLOW, quiet_s, "model", "info", "synthetic:tiny", "--digest", *options]
    with behind_terminal(command, {**home.environment, "COLUMNS": "100"}, output=output) as screen:
        yield screen


def test_what_takes_long_is_shown_and_goes_before_the_answer(home: Home) -> None:
    with info(home, AT_ONCE) as screen:
        screen.until(SHOWN)
        screen.type(b"\n")
        rest = screen.rest()
        assert screen.ended() == 0
    line, erased, answer = rest.rpartition(EMPTY_LINE)
    assert VISIBLE in line
    assert erased
    assert b"the digest" in answer
    assert b"reading" not in answer


def test_ctrl_c_leaves_a_clean_terminal(home: Home) -> None:
    with info(home, AT_ONCE) as screen:
        screen.until(SHOWN)
        screen.type(CTRL_C)
        screen.rest()
        assert screen.ended() == 130
    assert screen.shown.rindex(VISIBLE) > screen.shown.rindex(HIDDEN)
    assert b"reading" not in screen.shown.rpartition(EMPTY_LINE)[2]
    assert b"Traceback" not in screen.shown


def test_the_line_is_not_in_an_answer_that_goes_elsewhere(home: Home) -> None:
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb") as answer, info(home, AT_ONCE, output=writes) as screen:
        os.close(writes)
        screen.until(SHOWN)
        screen.type(b"\n")
        assert b"the digest" in answer.read()
        assert screen.ended() == 0
    assert b"the digest" not in screen.shown


def test_nothing_is_shown_of_what_is_over_soon(home: Home) -> None:
    with info(home, NEVER) as screen:
        screen.until(b"begun")
        screen.type(b"\n")
        screen.rest()
        assert screen.ended() == 0
    assert b"reading" not in screen.shown
    assert HIDDEN not in screen.shown


def test_nothing_is_shown_beside_json(home: Home) -> None:
    with info(home, AT_ONCE, "--json") as screen:
        screen.until(b"begun")
        screen.type(b"\n")
        rest = screen.rest()
        assert screen.ended() == 0
    assert json.loads(rest.split(b"\n")[-2])["model_digest"] == "the digest"
    assert b"reading" not in screen.shown
    assert HIDDEN not in screen.shown
