"""``benchmarks.startup``: a cold start is one after the files were really forgotten."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
from benchmarks import startup


def test_pages_in_memory_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * mmap.PAGESIZE + 1))
    with path.open("rb") as file:
        assert startup.pages_in_memory(file.fileno()) == 4


def test_a_file_counts_once_whatever_links_lead_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "empty").touch()
    assert list(startup.files_below([tmp_path, tmp_path])) == [tmp_path / "file"]


def test_a_start_that_would_not_be_cold_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where another process has the libraries mapped, or the system ignores what it is asked."""
    (tmp_path / "file").write_bytes(bytes(mmap.PAGESIZE))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    monkeypatch.setattr(startup, "check_tree", lambda _: None)
    monkeypatch.setattr(startup, "locate", lambda _: str(tmp_path))
    monkeypatch.setattr(startup, "files_below", lambda _: [tmp_path / "file"])
    monkeypatch.setattr(startup, "first_output_s", lambda _: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["startup"])
    with pytest.raises(SystemExit, match="no start would be cold: 100% of the files stay in memory"):
        startup.main()
