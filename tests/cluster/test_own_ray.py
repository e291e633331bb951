"""Somebody else's Ray is joined only where it asks for a token; ours is told to ask for one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tsqp.cluster import own_ray
from tsqp.cluster.own_ray import access, check_asks_for_token, check_installed, start_ray
from tsqp.cluster.state import ClusterDirectory
from tsqp.errors import ClusterError, OptionError
from tsqp.private_path import private_directory


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("with_token", "without", "said"),
    [
        ("", "", "lets everybody in who reaches its ports"),
        ("", "it is silent", "lets everybody in"),  # not a refusal
        ("Unauthenticated", "", "another token: Unauthenticated"),
    ],
)
def test_a_ray_without_a_token_is_refused(
    with_token: str, without: str, said: str, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        own_ray, "_probe", lambda _, variables: with_token if variables["RAY_AUTH_MODE"] == "token" else without
    )
    with pytest.raises(ClusterError, match=said):
        check_asks_for_token("10.0.0.1:6380", token)


def test_a_ray_that_asks_for_its_token_is_joined(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "ray.exceptions.AuthenticationError: Authentication required"
    monkeypatch.setattr(
        own_ray, "_probe", lambda _, variables: "" if variables["RAY_AUTH_MODE"] == "token" else refusal
    )
    check_asks_for_token("10.0.0.1:6380", token)
    with pytest.raises(OptionError, match="there is no such file"):
        check_asks_for_token("10.0.0.1:6380", token.with_name("none"))


def test_ray_is_told_to_ask_for_a_token_and_to_report_nothing(token: Path) -> None:
    for own in (True, False):
        variables = access(token, own=own)
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
        assert variables["RAY_AUTH_TOKEN_PATH"] == str(token)


def test_a_ray_that_says_nothing_is_not_waited_for_for_ever(
    token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command holds the cluster's lock meanwhile."""
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(own_ray, "HEAD_COMMAND", (sys.executable, "-c", "import sys, time; time.sleep(1000)"))
    monkeypatch.setattr(own_ray, "START_LIMIT_S", 0.0)
    directory = ClusterDirectory("a")
    private_directory(directory.path, "")
    with pytest.raises(ClusterError, match=r"^Ray did not start within 0 s: it said nothing$"):
        start_ray(directory, tmp_path / "ray", 1)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_ray, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'tsqp\[cluster\]'"):
        check_installed()
