"""API keys: 256 random bits each, of which a file keeps the SHA-256 and a name.

A plain hash is right here. A password needs a slow one, because a thief of its hash can try likely passwords; among
2^256 keys none is likelier than another. The hash keeps a copy of the file from being a copy of the keys.

Covers: who reads the file learns no key; keys are compared in constant time, all of them, whichever matches; the file
is refused where others could write or read it (tests/server/test_api_keys.py). Does not cover: who can write to the
file can let himself in. Assumes: ``os.urandom``.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from tsqp.errors import InputError, PathRefused
from tsqp.private_path import open_private, private_directory

PREFIX = "tsqp-"  # so that scanners for leaked secrets can know one
KEY_BYTES = 32
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_INSTEAD = "keep the file of API keys where you alone can write"

log = logging.getLogger("tsqp.server")


def new_key() -> str:
    """A fresh key."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def line_for(name: str, key: str) -> str:
    """The line of the file that lets ``key`` in as ``name``. Raises InputError for what is no name."""
    if not _NAME.fullmatch(name):
        raise InputError("the name of an API key has 1 to 64 letters, digits, dots, hyphens or underscores")
    return f"{name}:{hash_of(key)}"


class KeyFile:
    """The keys in a file: ``name:hash`` in each line; empty lines and those that begin with # say nothing.

    Several keys may have one name, such as an old and a new one: they are one tenant.
    Raises PathRefused, and InputError for a file that is none, with the number of the line and not the line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hashes = _read(path)

    def tenant_of(self, key: str) -> str | None:
        """The name of a key; None for one that is not in the file."""
        given = hash_of(key)
        found = None
        for known, name in self._hashes.items():  # to the end, so that time does not tell which one matches
            found = name if hmac.compare_digest(known, given) else found
        return found

    def read_again(self) -> None:
        """Take what the file says now; where it says nothing that can be used, what it said before stays in force."""
        try:
            self._hashes = _read(self._path)
        except (InputError, PathRefused) as error:
            log.error("the API keys were not read again: %s", error, extra={"event": "keys_not_read"})
            return
        log.info("%d API keys are in force", len(self._hashes), extra={"event": "keys_read"})


def add_line(path: Path, line: str) -> None:
    """Append a line to a file of keys. Raises PathRefused, OSError.

    The file is made with mode 0600 when missing, and a missing directory with mode 0700.
    """
    if not path.absolute().parent.exists():
        private_directory(path.absolute().parent, _INSTEAD)
    with os.fdopen(open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, _INSTEAD), "rb+", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        ends = not size or os.pread(file.fileno(), 1, size - 1) == b"\n"  # a file that was edited may not
        file.write(f"{'' if ends else chr(10)}{line}\n".encode())


def _read(path: Path) -> dict[str, str]:
    """Names by hash."""
    if not os.path.lexists(path):
        raise InputError(f"there is no {path}: tsqp api-key NAME --file {path} makes it, with a first key")
    with os.fdopen(open_private(path, os.O_RDONLY, _INSTEAD), "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path} is no file of API keys: it has more than {MAX_FILE_BYTES} bytes")
    hashes: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, _, digest = text.partition(":")
        if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest):
            raise InputError(f"line {number} of {path} is not name:hash, as tsqp api-key prints it")
        if digest in hashes:
            raise InputError(f"line {number} of {path} has the hash of an earlier line: leave out one of them")
        hashes[digest] = name
    if not hashes:
        raise InputError(f"{path} has no API key, so nobody could use the server: add one by tsqp api-key")
    return hashes
