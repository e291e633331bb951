"""Refusals and waits that no conversation of two well-behaved sides comes to."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from tsqp.errors import OptionError, ProtocolError
from tsqp.wire.transport import listen
from tsqp.wire.transport.runtime_dir import runtime_directory
from tsqp.wire.transport.sockets import to_frames


def test_a_descriptor_cannot_be_watched_over_mem() -> None:
    with pytest.raises(OptionError, match="cannot be watched over mem"):
        listen("mem:watched", watch_fd=0)


def test_a_message_of_no_part_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without a control frame"):
        to_frames([], 1 << 20)


def test_a_listener_that_nobody_calls_waits_no_longer_than_it_was_told() -> None:
    with closing(listen("mem:silent")) as listener:
        assert listener.receive(0.0) is None


@pytest.mark.parametrize("named", ["", "relative", "/no/such/directory"])
def test_without_a_usable_runtime_directory_the_temporary_one_holds_ours(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime_directory() == tmp_path / f"tsqp-{os.geteuid()}"
    assert runtime_directory().stat().st_mode & 0o777 == 0o700
