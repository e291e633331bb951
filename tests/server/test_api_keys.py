"""The file of API keys: hashes alone, refused where others could change it, read again on demand."""

from __future__ import annotations

import hashlib
import logging
import stat
from pathlib import Path

import pytest

from tsqp.errors import InputError, PathRefused
from tsqp.server.api_keys import KEY_BYTES, KeyFile, add_line, hash_of, line_for, new_key


def file_of(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


def test_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("tsqp-") and len(key) >= 5 + KEY_BYTES * 4 // 3 for key in keys)


def test_a_file_has_no_key(tmp_path: Path) -> None:
    key = new_key()
    add_line(tmp_path / "keys", line_for("alice", key))
    content = (tmp_path / "keys").read_text()
    assert content == f"alice:{hashlib.sha256(key.encode()).hexdigest()}\n"
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def test_a_directory_that_is_missing_is_made_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys" / "api"
    key = new_key()
    add_line(path, line_for("alice", key))
    assert KeyFile(path).tenant_of(key) == "alice"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_line_is_added_to_a_file_whose_last_line_has_no_end(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("alice", "bob", "carol")}
    path = tmp_path / "keys"
    path.write_text(line_for("alice", keys["alice"]))
    path.chmod(0o600)
    for name in ("bob", "carol"):
        add_line(path, line_for(name, keys[name]))
    assert [KeyFile(path).tenant_of(key) for key in keys.values()] == list(keys)
    assert len(path.read_text().splitlines()) == 3


def test_two_keys_of_one_name_are_one_tenant(tmp_path: Path) -> None:
    old, new, other = new_key(), new_key(), new_key()
    lines = ["# keys of the team", "", line_for("alice", old), "  " + line_for("alice", new), line_for("bob", other)]
    keys = KeyFile(file_of(tmp_path / "keys", *lines))
    assert [keys.tenant_of(key) for key in (old, new, other)] == ["alice", "alice", "bob"]
    for wrong in ("", "alice", hash_of(old), new_key(), old + " ", "\ud800", "x" * 10_000_000):
        assert keys.tenant_of(wrong) is None


@pytest.mark.parametrize(
    "line", ["alice", "alice:", ":" + "0" * 64, "alice:" + "0" * 63, "alice:" + "G" * 64, "a b:" + "0" * 64]
)
def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match="line 2 of") as raised:
        KeyFile(file_of(tmp_path / "keys", line_for("bob", new_key()), line))
    assert line not in str(raised.value)


def test_a_key_in_place_of_its_hash_is_not_shown(tmp_path: Path) -> None:
    key = new_key()
    with pytest.raises(InputError, match="line 1") as raised:
        KeyFile(file_of(tmp_path / "keys", f"alice:{key}"))
    assert key not in str(raised.value)


def test_a_file_that_lets_nobody_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no API key"):
        KeyFile(file_of(tmp_path / "keys", "# none yet"))


def test_the_same_key_twice_is_refused(tmp_path: Path) -> None:
    key = new_key()
    with pytest.raises(InputError, match="line 2"):
        KeyFile(file_of(tmp_path / "keys", line_for("alice", key), line_for("bob", key)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = file_of(tmp_path / "keys", line_for("alice", new_key()))
    path.chmod(mode)
    with pytest.raises(PathRefused, match="chmod 600"):
        KeyFile(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(InputError, match=f"there is no {path}: tsqp api-key NAME --file {path} makes it"):
        KeyFile(path)


@pytest.mark.parametrize("name", ["", "a:b", "a b", "-a", "a" * 65, "ä", "a\n"])
def test_a_name_is_short_and_plain(name: str) -> None:
    with pytest.raises(InputError, match="name of an API key"):
        line_for(name, new_key())


def test_what_the_file_says_now_is_taken_on_demand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = new_key(), new_key()
    path = file_of(tmp_path / "keys", line_for("alice", old))
    keys = KeyFile(path)
    file_of(path, line_for("alice", new))
    assert keys.tenant_of(new) is None
    with caplog.at_level(logging.INFO):
        keys.read_again()
    assert (keys.tenant_of(old), keys.tenant_of(new)) == (None, "alice")
    assert "1 API keys are in force" in caplog.text
    file_of(path, "nonsense")
    keys.read_again()
    assert keys.tenant_of(new) == "alice"  # a slip of the editor locks nobody out, and lets nobody in
    assert "were not read again" in caplog.text
