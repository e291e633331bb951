"""What lies on disk of a cluster: private, replaced whole, and not believed where it is garbage."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.fake_pool import FRONT, STARTED
from tsqp.cluster.state import ClusterDirectory, Group, Record, known_clusters, replace_private
from tsqp.errors import ClusterError, OptionError, PathRefused

RECORD = Record(
    2,
    "a",
    "here",
    "tsqp-a-0",
    "127.0.0.1:6379",
    True,
    "/tmp/tsqp-ray-0123456789ab",
    "/t",
    FRONT,
    STARTED,
    ("0..3",),
    2,
    (Group("g", (0, 1)),),
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterDirectory:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return ClusterDirectory("a")


def test_what_is_written_is_read_and_is_this_users_alone(directory: ClusterDirectory) -> None:
    assert (directory.read(), directory.path.exists(), known_clusters()) == (None, False, [])
    directory.write(RECORD)
    directory.write(msgspec.structs.replace(RECORD, replicas=3))
    read = directory.read()
    assert read is not None
    assert (read.replicas, read.layout.workers) == (3, 3)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory.path, *directory.path.iterdir())}
    assert modes == {"a": 0o700, "cluster.json": 0o600}
    assert known_clusters() == ["a"]


def test_without_a_home_nothing_is_made_in_the_directory_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_state_dir", lambda name: f"~/.local/state/{name}")
    with pytest.raises(PathRefused, match="not an absolute path; set XDG_STATE_HOME"):
        ClusterDirectory("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a-", "x" * 33, "a\n"])
def test_a_name_that_would_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="cannot name a cluster"):
        ClusterDirectory(name)


def test_garbage_is_one_clear_line(directory: ClusterDirectory) -> None:
    directory.write(RECORD)
    good = json.loads(msgspec.json.encode(RECORD))
    wrong: list[object] = [
        *({**good, "version": 1}, {**good, "more": 1}, {**good, "replicas": 0}, {**good, "name": "../x"}),
        *(
            {**good, "shards": []},
            {**good, "ray_path": "/tmp"},
            {**good, "ray_path": "tsqp-ray-0123456789ab"},
            [],
            None,
        ),
    ]
    for document in (
        *(json.dumps(one).encode() for one in wrong),
        b"",
        b"\xff",
        b"{",
        b"[" * 100_000,
        b" " * (1 << 21),
    ):
        replace_private(directory.path / "cluster.json", document)
        with pytest.raises(ClusterError, match=r"not what was written there: tsqp cluster down --name a"):
            directory.read()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_refused(document: bytes) -> None:
    directory = ClusterDirectory("garbage")
    directory.write(RECORD)
    replace_private(directory.path / "cluster.json", document)
    with pytest.raises(ClusterError):
        directory.read()


def test_a_file_that_others_can_write_is_not_read(directory: ClusterDirectory) -> None:
    directory.write(RECORD)
    (directory.path / "cluster.json").chmod(0o666)
    with pytest.raises(PathRefused, match="open to others"):
        directory.read()


def test_a_directory_that_others_can_enter_is_not_read(directory: ClusterDirectory) -> None:
    directory.write(RECORD)
    directory.path.chmod(0o755)
    for use in (directory.read, lambda: directory.write(RECORD)):
        with pytest.raises(PathRefused, match="open to others"):
            use()


def test_a_writer_that_was_killed_leaves_the_old_one(directory: ClusterDirectory) -> None:
    directory.write(RECORD)
    (directory.path / ".cluster.json.new").write_bytes(b"half")
    assert directory.read() == RECORD
    directory.write(msgspec.structs.replace(RECORD, replicas=1))
    assert sorted(path.name for path in directory.path.iterdir()) == ["cluster.json"]


def test_one_command_at_a_time(directory: ClusterDirectory) -> None:
    with (
        directory.locked(),
        pytest.raises(ClusterError, match="another command is changing cluster a"),
        ClusterDirectory("a").locked(),
    ):
        pass
    with directory.locked(), ClusterDirectory("b").locked():
        pass


def test_a_lock_goes_with_its_cluster(directory: ClusterDirectory) -> None:
    with directory.locked():
        directory.remove(directory.ray_path())
    assert list(directory.path.parent.iterdir()) == []
    again = ClusterDirectory("a")

    def fail() -> None:
        with again.locked():
            again.remove(again.ray_path())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(directory.path.parent.iterdir()) == []


def test_rays_directory_is_short_and_stays_where_it_was_made(
    directory: ClusterDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = directory.ray_path()
    assert made == ClusterDirectory("a").ray_path() != ClusterDirectory("b").ray_path()
    assert len(os.fsencode(made.name)) < 24
    record = msgspec.structs.replace(RECORD, ray_path=str(made))
    monkeypatch.setattr("tempfile.tempdir", "/elsewhere")
    assert directory.ray_path(record) == made != directory.ray_path()
