"""Sockets on disk: who may have one, what is removed for it, and what never is."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tsqp.errors import AddressError, AddressInUse, PathRefused, WorkerUnreachable
from tsqp.wire.transport import connect, listen, new_ipc_address
from tsqp.wire.transport.address import Address, parse_address
from tsqp.wire.transport.claim import AddressClaim, lock_path
from tsqp.wire.transport.runtime_dir import reclaim_stale, runtime_directory

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


def leave_stale_socket(path: Path) -> None:
    """What a killed worker leaves: a socket nobody listens on, and a lock nobody holds."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    lock_path(path).touch(mode=0o600)


@pytest.fixture
def run_dir(private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """XDG_RUNTIME_DIR of this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(private_dir))
    return private_dir


# Claims


def test_one_claim_at_a_time(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    address = Address("ipc", str(path))
    claim = AddressClaim.acquire(address)
    with pytest.raises(AddressInUse, match=str(path)):
        AddressClaim.acquire(address)
    assert lock_path(path).exists()
    claim.release()
    claim.release()
    assert list(private_dir.iterdir()) == []
    AddressClaim.acquire(address).release()


def test_a_stale_socket_is_reclaimed(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    leave_stale_socket(path)
    with pytest.raises(WorkerUnreachable):
        connect(str(path))
    with closing(listen(str(path))), closing(connect(str(path))):
        pass
    assert list(private_dir.iterdir()) == []


def test_a_stale_socket_without_a_lock_is_reclaimed(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    leave_stale_socket(path)
    lock_path(path).unlink()
    listen(str(path)).close()
    assert list(private_dir.iterdir()) == []


def test_a_live_socket_of_another_program_is_left_alone(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(AddressInUse):
            listen(str(path))
        assert path.exists()
        assert not lock_path(path).exists()


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), Path.mkdir, os.mkfifo])
def test_what_is_not_a_socket_is_never_deleted(private_dir: Path, make: Callable[[Path], object]) -> None:
    path = private_dir / "x.sock"
    make(path)
    before = path.lstat()
    with pytest.raises(PathRefused, match="not a socket"):
        listen(str(path))
    assert os.path.samestat(before, path.lstat())
    assert not lock_path(path).exists()


def test_a_symlink_is_not_followed(private_dir: Path) -> None:
    path, target = private_dir / "x.sock", private_dir / "target"
    leave_stale_socket(target)
    path.symlink_to(target)
    with pytest.raises(PathRefused, match="symbolic link"):
        listen(str(path))
    assert target.exists()


def test_a_lock_that_is_not_ours_is_not_touched(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    lock_path(path).touch(mode=0o600)
    lock_path(path).write_text("notes")
    with pytest.raises(AddressError, match="not a lock of ours"):
        listen(str(path))
    assert lock_path(path).read_text() == "notes"
    lock_path(path).unlink()
    lock_path(path).symlink_to(private_dir / "elsewhere")
    with pytest.raises(PathRefused, match="lock is a symbolic link; remove it"):
        listen(str(path))
    assert not (private_dir / "elsewhere").exists()


def test_a_lock_that_was_unlinked_before_it_was_taken_is_not_enough(
    private_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = private_dir / "x.sock"
    replaced: list[int] = []

    def flock(fd: int, operation: int) -> None:
        # Between open and flock, the last holder removes its file and another worker makes and holds a new one.
        if operation & fcntl.LOCK_NB and not replaced:
            lock_path(path).unlink()
            replaced.append(os.open(lock_path(path), os.O_RDWR | os.O_CREAT, 0o600))
            real_flock(replaced[0], fcntl.LOCK_EX)
        real_flock(fd, operation)

    real_flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    try:
        with pytest.raises(AddressInUse):
            AddressClaim.acquire(Address("ipc", str(path)))
    finally:
        os.close(replaced[0])


# Directories that the user chose


def test_the_directory_must_exist(private_dir: Path) -> None:
    path = private_dir / "missing" / "x.sock"
    with pytest.raises(PathRefused, match="made with mode 700"):
        listen(str(path))
    with pytest.raises(WorkerUnreachable, match=str(path)):
        connect(str(path))


def test_the_directory_must_be_one(private_dir: Path) -> None:
    (private_dir / "file").touch()
    with pytest.raises(PathRefused, match="is not a directory"):
        listen(str(private_dir / "file" / "x.sock"))


@pytest.mark.parametrize("mode", [0o1777, 0o770, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(private_dir: Path, mode: int) -> None:
    private_dir.chmod(mode)
    for use in (listen, connect):
        with pytest.raises(PathRefused, match=f"chmod go-w {private_dir} or use a private directory"):
            use(str(private_dir / "x.sock"))


def test_a_directory_that_others_can_only_read_is_allowed(private_dir: Path) -> None:
    private_dir.chmod(0o755)
    with closing(listen(str(private_dir / "x.sock"))), closing(connect(str(private_dir / "x.sock"))):
        pass


@needs_root
def test_a_directory_of_another_user_is_refused(private_dir: Path) -> None:
    os.chown(private_dir, 65_534, 65_534)
    for use in (listen, connect):
        with pytest.raises(PathRefused, match="another user"):
            use(str(private_dir / "x.sock"))


@needs_root
def test_a_stale_socket_of_another_user_is_left_alone(private_dir: Path) -> None:
    path = private_dir / "x.sock"
    leave_stale_socket(path)
    os.chown(path, 65_534, 65_534)
    with pytest.raises(PathRefused, match="another user"):
        listen(str(path))
    assert path.exists()


# The runtime directory


def test_the_runtime_directory_is_private(run_dir: Path) -> None:
    before = os.umask(0)
    try:
        directory = runtime_directory()
    finally:
        os.umask(before)
    assert directory == run_dir / "tsqp"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert runtime_directory() == directory


@pytest.mark.parametrize("unusable", ["", "relative", "/nowhere/at/all"])
def test_without_a_usable_xdg_directory_it_is_in_the_temporary_one(
    unusable: str, private_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
    monkeypatch.setattr("tempfile.tempdir", str(private_dir))
    assert runtime_directory() == private_dir / f"tsqp-{os.geteuid()}"


def make_symlink(path: Path) -> None:
    (path.parent / "target").mkdir(mode=0o700)
    path.symlink_to(path.parent / "target")


def make_open_to_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o750)


def make_of_another_user(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 65_534, 65_534)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (make_symlink, "is a symbolic link"),
        (Path.touch, "is not a directory"),
        (make_open_to_others, "is open to others .mode 750.; remove it"),
        pytest.param(make_of_another_user, "belongs to another user", marks=needs_root),
    ],
)
def test_an_unsafe_runtime_directory_is_refused(make: Callable[[Path], None], complaint: str, run_dir: Path) -> None:
    make(run_dir / "tsqp")
    for use in (runtime_directory, new_ipc_address, lambda: reclaim_stale(run_dir / "tsqp")):
        with pytest.raises(PathRefused, match=complaint) as caught:
            use()
        assert "XDG_RUNTIME_DIR" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_new_addresses_differ_and_can_be_used(run_dir: Path) -> None:
    first, second = new_ipc_address(), new_ipc_address()
    assert first != second
    with closing(listen(first)), closing(listen(second)), closing(connect(first)), closing(connect(second)):
        assert parse_address(first).path.parent == run_dir / "tsqp"
    assert list((run_dir / "tsqp").iterdir()) == []


def test_a_runtime_directory_with_a_path_too_long_for_sockets(
    private_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = private_dir / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(AddressError, match="at most 107 bytes"):
        new_ipc_address()


def test_only_what_dead_workers_left_is_removed(run_dir: Path) -> None:
    directory = runtime_directory()
    dead, file = directory / "dead.sock", directory / "file.sock"
    leave_stale_socket(dead)
    file.write_text("mine")
    lock_path(file).touch(mode=0o600)
    live = new_ipc_address()  # sweeps on its way
    assert not dead.exists()
    with closing(listen(live)), closing(connect(live)):
        leave_stale_socket(dead)
        assert reclaim_stale(directory) == [dead]
        live_path = parse_address(live).path
        assert set(directory.iterdir()) == {live_path, lock_path(live_path), file}
    assert file.read_text() == "mine"
