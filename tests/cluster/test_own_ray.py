"""Somebody else's Ray is joined only where it asks for a token; ours is told to ask for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsqp.cluster import own_ray
from tsqp.cluster.own_ray import access, check_asks_for_token, check_installed
from tsqp.errors import ClusterError, OptionError


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


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_ray, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'tsqp\[cluster\]'"):
        check_installed()
