"""The front's process: it hands out its file as it is now, and the last good one when the file is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import LIMIT_S
from tests.fronts import front_process, not_utf8, replace
from tsqp.errors import RosterError, TsqpError
from tsqp.untrusted.front import RosterFile, front_options, serve
from tsqp.wire.roster import Member, roster_document
from tsqp.wire.transport.front import find_roster, parse_roster_address


def of_epoch(epoch: int) -> bytes:
    return roster_document(epoch, [Member("tcp://127.0.0.1:7000", "0..17")])


def test_what_is_handed_out_follows_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "roster.json"
    with pytest.raises(RosterError, match="cannot be read: No such file"):
        RosterFile(path)
    replace(path, b"{}")
    with pytest.raises(RosterError, match="none of version 1"):
        RosterFile(path)
    replace(path, of_epoch(1))
    file = RosterFile(path)
    assert file.document() == of_epoch(1)
    replace(path, of_epoch(2))  # of the same size, and maybe at the same tick of the clock
    assert file.document() == of_epoch(2)
    caplog.clear()
    for fault in (b"{", b"{", not_utf8(of_epoch(3))):
        replace(path, fault)
        assert file.document() == of_epoch(2)
    path.unlink()
    assert file.document() == of_epoch(2)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3  # each fault once
    replace(path, of_epoch(3))
    assert file.document() == of_epoch(3)


def test_a_process_hands_it_out_until_its_parent_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    replace(path, of_epoch(1))
    with front_process(path, "--exit-with-stdin") as (process, address):
        assert find_roster(parse_roster_address(address)).epoch == 1
        replace(path, of_epoch(2))
        assert find_roster(parse_roster_address(address)).epoch == 2
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", "tcp://127.0.0.1:0", "--roster", "/nowhere/roster.json"], "cannot be read"),
        (["--listen", "ipc:///tmp/x", "--roster", os.devnull], "listens on a tcp address"),
        (["--listen", "tcp://x", "--roster", os.devnull], "malformed address"),
        (["--listen", "tcp://127.0.0.1:0", "--roster", os.devnull], "none of version 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(TsqpError, match=says):
        serve(front_options(arguments))


def test_a_process_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, "-m", "tsqp.untrusted.front", "--listen", "tcp://x", "--roster", os.devnull]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("tsqp front: error: malformed address")
