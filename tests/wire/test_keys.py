"""Key files: private, never overwritten, checked when they are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tsqp.errors import AddressError, PathRefused
from tsqp.wire.transport.keys import create_keys, load_public, load_secret


def test_a_pair_can_be_read_back(private_dir: Path) -> None:
    before = os.umask(0)
    try:
        files = create_keys(private_dir / "keys", "worker")
    finally:
        os.umask(before)
    assert stat.S_IMODE((private_dir / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE(files.secret.stat().st_mode) == 0o600
    assert {path.name for path in files.public.parent.iterdir()} == {"worker.key", "worker.key_secret"}
    pair = load_secret(files.secret)
    assert pair.public == load_public(files.public)
    assert pair.secret not in files.public.read_bytes()
    assert pair.secret.decode() not in repr(pair)


@pytest.mark.parametrize("existing", ["worker.key", "worker.key_secret"])
def test_nothing_is_overwritten(private_dir: Path, existing: str) -> None:
    (private_dir / existing).write_text("mine")
    with pytest.raises(AddressError, match="choose another"):
        create_keys(private_dir, "worker")
    assert [path.name for path in private_dir.iterdir()] == [existing]
    assert (private_dir / existing).read_text() == "mine"


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\nb", "x" * 65])
def test_names_stay_in_their_directory(private_dir: Path, name: str) -> None:
    with pytest.raises(AddressError, match="cannot name a key"):
        create_keys(private_dir, name)


def test_a_directory_that_cannot_be_made(private_dir: Path) -> None:
    (private_dir / "file").touch()
    with pytest.raises(AddressError):
        create_keys(private_dir / "file" / "keys", "worker")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_secret_that_others_can_reach_is_refused(private_dir: Path, mode: int) -> None:
    files = create_keys(private_dir, "worker")
    files.secret.chmod(mode)
    with pytest.raises(PathRefused, match=f"chmod 600 {files.secret}"):
        load_secret(files.secret)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_of_another_user_is_refused(private_dir: Path) -> None:
    files = create_keys(private_dir, "worker")
    os.chown(files.secret, 65_534, 65_534)
    with pytest.raises(PathRefused, match="another user"):
        load_secret(files.secret)


def test_the_public_file_is_no_secret_one(private_dir: Path) -> None:
    files = create_keys(private_dir, "worker")
    for mode in (0o644, 0o600):  # the mode of a public file is not what is wrong with it
        files.public.chmod(mode)
        with pytest.raises(AddressError, match="holds no secret key"):
            load_secret(files.public)


def test_missing_files(private_dir: Path) -> None:
    for load in (load_public, load_secret):
        with pytest.raises(AddressError, match="cannot read"):
            load(private_dir / "nothing.key_secret")
        with pytest.raises((AddressError, PathRefused)):
            load(private_dir)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"public-key\n", b'public-key = "short"\n', b'public-key = "' + b"~" * 40 + b'"\n'],
)
def test_damaged_files(private_dir: Path, content: bytes) -> None:
    path = private_dir / "x.key"
    path.write_bytes(content)
    path.chmod(0o600)
    for load in (load_public, load_secret):
        with pytest.raises(AddressError):
            load(path)


def test_a_secret_never_shows_in_an_error(private_dir: Path) -> None:
    files = create_keys(private_dir, "worker")
    secret = load_secret(files.secret).secret
    damaged = files.secret.read_bytes().replace(secret, secret[:-1] + b"~")
    files.secret.write_bytes(damaged)
    with pytest.raises(AddressError, match="damaged") as caught:
        load_secret(files.secret)
    assert secret[:-1].decode() not in str(caught.value)
