"""Who has a key of the file is its tenant; nobody else gets past, but to the health of the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.server.asgi import ask, echo, error_of
from tsqp.server.api_keys import KeyFile, add_line, line_for, new_key
from tsqp.server.guards.faults import Faults
from tsqp.server.guards.keys import Keys


@pytest.fixture
def alice(tmp_path: Path) -> tuple[Faults, str]:
    key, path = new_key(), tmp_path / "keys"
    add_line(path, line_for("alice", key))
    add_line(path, line_for("bob", new_key()))
    return Faults(Keys(echo, KeyFile(path), ["/livez"])), key


def test_a_key_is_a_tenant(alice: tuple[Faults, str]) -> None:
    app, key = alice
    for kind in ("Bearer", "bearer", "BEARER"):
        answer = ask(app, headers={"authorization": f"{kind} {key}"})
        assert (answer.status_code, answer.headers["x-tenant"]) == (200, "alice")


def test_without_a_key_of_the_file_there_is_no_answer(alice: tuple[Faults, str]) -> None:
    app, key = alice
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        key,
        f"Basic {key}",
        f"Bearer {key[:-1]}",
        f"Bearer {key}x",
        f"Bearer {new_key()}",
    ]
    for value in [*wrong, "Bearer " + "x" * 100_000, "Bearer alice", f"Bearer {os.urandom(8).hex()}"]:
        answer = ask(app, headers={"authorization": value})
        assert answer.status_code == 401, value[:40]
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert key[6:] not in answer.text
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(app).status_code == 401


def test_health_needs_no_key(alice: tuple[Faults, str]) -> None:
    assert ask(alice[0], "/livez").headers["x-tenant"] == ""
    assert ask(alice[0], "/livez/").status_code == 401


def test_a_server_without_keys_has_one_tenant() -> None:
    for value in ("", "Bearer anything"):
        answer = ask(Keys(echo, None, ()), headers={"authorization": value})
        assert (answer.status_code, answer.headers["x-tenant"]) == (200, "")
