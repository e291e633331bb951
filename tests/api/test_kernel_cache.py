"""Compiled kernels are code: they are kept only where nobody else can put any."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tsqp.api import kernel_cache
from tsqp.api.kernel_cache import kernel_cache_directory
from tsqp.arith.jit import cache_name
from tsqp.errors import PathRefused


def test_auto_is_a_private_directory_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    directory = kernel_cache_directory("auto")
    assert directory == tmp_path / "kernels" / cache_name()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_in_a_tee_there_is_none_unless_a_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: "Intel TDX")
    assert kernel_cache_directory("auto") is None
    assert kernel_cache_directory(str(tmp_path / "named")) == tmp_path / "named" / cache_name()


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    assert kernel_cache_directory("off") is None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(PathRefused, match=f"open to others.*chmod go-w {tmp_path} or choose another --kernel-cache"):
        kernel_cache_directory(str(tmp_path))


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PathRefused, match="cannot be used: Not a directory"):
        kernel_cache_directory(str(tmp_path / "file" / "kernels"))
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    assert kernel_cache_directory("auto") is None  # nobody asked for one
