"""CURVE keys for TCP: who may talk to whom. Files are ZeroMQ certificates; secret ones are readable by us alone.

Covers: an attacker on the network reads nothing and changes nothing; only listed clients reach a worker; a client
talks only to the worker whose public key it holds. Does not cover: the worker itself, which sees whatever the
protection mode sends it. Assumes: libsodium, and that public keys were exchanged over a channel that keeps them intact.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq.auth
from zmq.utils import z85

from tsqp.errors import AddressError
from tsqp.private_path import DIRECTORY_MODE, FILE_MODE, follow, make_directories, open_private, reach

_Z85_KEY = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # 32 bytes in Z85
OTHER_FILE = "keep keys in a directory that you alone can write to"
_KEY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class KeyPair:
    """A key pair in Z85. The secret half never shows in a repr, a log or an error."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ClientKeys:
    """What the trusted side needs: its own pair, and the public key of the one worker that it will talk to."""

    own: KeyPair
    worker: bytes


@dataclass(frozen=True)
class WorkerKeys:
    """What a worker needs: its own pair, and the public keys of the clients that it lets in."""

    own: KeyPair
    clients: frozenset[bytes]

    def __post_init__(self) -> None:
        if not self.clients:
            raise AddressError("a worker with keys needs the public key of at least one client that it lets in")


class KeyFiles(NamedTuple):
    """Where a pair lies: ``NAME.key`` to give away, ``NAME.key_secret`` to keep."""

    public: Path
    secret: Path


def is_public_key(text: str) -> bool:
    """Whether a text is 32 bytes in Z85, as a public key is; whether anybody has its secret half is not known."""
    if not text.isascii() or not _Z85_KEY.fullmatch(text.encode("ascii")):
        return False
    try:
        z85.decode(text)
    except struct.error:  # five characters can say more than four bytes hold
        return False
    return True


def create_keys(directory: Path, name: str) -> KeyFiles:
    """Write a new pair, the secret half with mode 0600; a missing directory is made with mode 0700.

    Never overwrites. Raises AddressError, and PathRefused where others could exchange the files.
    """
    if not _KEY_NAME.fullmatch(name):
        raise AddressError(f"{name[:100]!a} cannot name a key; use letters, digits, dots, dashes and underscores")
    files = KeyFiles(directory / f"{name}.key", directory / f"{name}.key_secret")
    try:
        make_directories(directory, DIRECTORY_MODE)
        reach(files.secret, OTHER_FILE)
        # Written where only we can look, then linked into place: a link fails where a file exists already.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".keys-") as workshop:
            made_public, made_secret = zmq.auth.create_certificates(workshop, name)
            Path(made_secret).chmod(FILE_MODE)
            os.link(made_secret, files.secret)
            _link_or_undo(Path(made_public), files.public, undo=files.secret)
    except FileExistsError:
        raise AddressError(f"{files.public} cannot be made: something has that name; choose another") from None
    except OSError as error:
        raise AddressError(f"cannot write keys to {directory}: {error.strerror}") from None
    return files


def load_public(path: Path) -> bytes:
    """The public key in a file. Raises AddressError."""
    return _load(path)[0]


def load_secret(path: Path) -> KeyPair:
    """The key pair in a secret file. Raises AddressError, and PathRefused when others could reach the file."""
    if path.is_file():
        _load_pair(path)  # before its mode: a public key in its place is open to others by right
    # Links are followed: orchestrators hand out secrets as links. The name is read again below, by ZeroMQ.
    try:
        os.close(open_private(follow(path, OTHER_FILE), os.O_RDONLY, OTHER_FILE))
    except OSError as error:
        raise AddressError(f"cannot read the secret key {path}: {error.strerror}") from None
    return _load_pair(path)


def _load_pair(path: Path) -> KeyPair:
    public, secret = _load(path)
    if secret is None:
        raise AddressError(f"{path} holds no secret key; name the file that ends in .key_secret")
    return KeyPair(public, secret)


def _link_or_undo(source: Path, target: Path, *, undo: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        undo.unlink()
        raise


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        raise AddressError(f"cannot read the key {path}: {error.strerror or 'no such file'}") from None
    except (ValueError, IndexError):
        raise AddressError(f"{path} is not a key file; make one with: tsqp keys") from None
    if not all(_Z85_KEY.fullmatch(key) for key in (public, secret) if key is not None):
        raise AddressError(f"{path} is damaged: a key in it does not have 40 characters of Z85")
    return public, secret
