"""What lies on disk of a cluster, for the commands that come after ``up``: a private directory for each name.

Covers: nobody but this user reads or replaces it (private_path.py); what cannot be read is refused in one line and not
believed in part (test_state.py); two commands do not change one cluster at once (test_state.py). Does not cover: what
this user's other processes do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs
from msgspec import Meta

from tsqp.cluster.layout import Layout
from tsqp.errors import ClusterError, OptionError, PathRefused
from tsqp.private_path import open_private, private_directory

NAME = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
RECORD = "cluster.json"
RAY_PATH = r"^(/.*tsqp-ray-[0-9a-f]{12})?$"  # what is there is removed by `down`
OTHER_DIRECTORY = "set XDG_STATE_HOME to a private directory"
MOST_BYTES = 1 << 20
_Count = Annotated[int, Meta(ge=1, le=4096)]


class Started(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What workers are started with. ``allow``: public keys of trusted sides; without, workers have no keys."""

    model: str
    device: str
    threads: int | None
    interface: str
    allow: tuple[str, ...]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A placement group, and the numbers of the workers that it has places for, in order. Not all places are taken."""

    name: str
    numbers: tuple[int, ...]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cluster as it was last changed. ``ray``: host and port. ``own``: whether Ray was started with it.

    ``host``: the machine that began it. ``namespace``: of its actors and placement groups, by Ray's names.
    ``ray_path``: the directory of a Ray of its own.
    """

    version: Literal[2]
    name: Annotated[str, Meta(pattern=f"^{NAME}$")]
    host: str
    namespace: Annotated[str, Meta(max_length=64)]
    ray: Annotated[str, Meta(max_length=256)]
    own: bool
    ray_path: Annotated[str, Meta(pattern=RAY_PATH)]
    token: str
    front: str
    started: Started
    shards: Annotated[tuple[str, ...], Meta(min_length=1, max_length=4096)]
    replicas: _Count
    groups: tuple[Group, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.shards, self.replicas)


def new_namespace(name: str) -> str:
    """One that no other cluster of a Ray has: two machines may begin clusters of one name on it."""
    return f"tsqp-{name}-{secrets.token_hex(4)}"


class ClusterDirectory:
    """The directory of one cluster, at ``path`` or where this user's are. It is made when something is written.

    Raises OptionError for a name that cannot be one, and PathRefused.
    """

    def __init__(self, name: str, path: Path | None = None) -> None:
        if not re.fullmatch(NAME, name):
            raise OptionError(f"{name[:60]!a} cannot name a cluster: use small letters, digits and hyphens, at most 32")
        self.name = name
        self.path = _clusters() / name if path is None else path

    @property
    def roster(self) -> Path:
        return self.path / "roster.json"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def log(self) -> Path:
        return self.path / "ray.log"

    def ray_path(self, record: Record | None = None) -> Path:
        """Where Ray has its files: as the record says, or where a Ray that this process starts would have them.

        Ray puts sockets below it, so its path has to be short, and is not below ours.
        """
        if record is not None and record.ray_path:
            return Path(record.ray_path)
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
        return Path(tempfile.gettempdir()).absolute() / f"tsqp-ray-{digest}"

    def read(self) -> Record | None:
        """None where there is no cluster. Raises ClusterError, PathRefused."""
        if not os.path.lexists(self.path):  # to look is not to make it
            return None
        path = private_directory(self.path, OTHER_DIRECTORY) / RECORD
        if not path.exists():
            return None
        with os.fdopen(open_private(path, os.O_RDONLY, OTHER_DIRECTORY), "rb") as file:
            document = file.read(MOST_BYTES + 1)
        try:
            if len(document) > MOST_BYTES:
                raise ValueError
            return msgspec.json.decode(document, type=Record)
        except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
            raise ClusterError(
                f"{path} is not what was written there: tsqp cluster down --name {self.name} clears it away"
            ) from None

    def write(self, record: Record) -> None:
        """Replace what is there. Raises PathRefused, OSError."""
        private_directory(self.path, OTHER_DIRECTORY)
        replace_private(self.path / RECORD, msgspec.json.encode(record))

    def remove(self, ray_path: Path) -> None:
        """Remove it, and what Ray left in its own. What is somebody else's stays."""
        for path in (ray_path, self.path):
            with suppress(PathRefused):
                if path.exists():
                    shutil.rmtree(private_directory(path, OTHER_DIRECTORY), ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While one command changes the cluster, others wait or are refused. Raises ClusterError."""
        path = self.path.parent / f"{self.name}.lock"  # beside it: the directory may go
        fd = open_private(path, os.O_RDWR | os.O_CREAT, OTHER_DIRECTORY)
        try:
            if not taken(fd, path):
                raise ClusterError(f"another command is changing cluster {self.name}: try again when it is done")
            try:
                yield
            finally:
                if not self.path.exists():
                    path.unlink(missing_ok=True)
        finally:
            os.close(fd)


def taken(fd: int, path: Path) -> bool:
    """Lock a file or directory, unless another process has it. One that its last holder removed is no lock any more."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(fd))
    except (BlockingIOError, FileNotFoundError):
        return False


def replace_private(path: Path, document: bytes) -> None:
    """Write a file of mode 0600 so that a reader sees the old or the new one, whole. Raises PathRefused, OSError."""
    fresh = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()  # of a writer that was killed
    with os.fdopen(open_private(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OTHER_DIRECTORY), "wb") as file:
        file.write(document)
    fresh.replace(path)


def known_clusters() -> list[str]:
    """Names of clusters of this user that have a record, whatever is in it. Raises PathRefused."""
    return sorted(path.parent.name for path in _clusters().glob(f"*/{RECORD}") if re.fullmatch(NAME, path.parent.name))


def _clusters() -> Path:
    """``$XDG_STATE_HOME/tsqp/clusters``, or that below ``~/.local/state``. Raises PathRefused.

    Not the runtime directory: that goes when its user logs out, and a cluster need not.
    """
    state = Path(platformdirs.user_state_dir("tsqp"))
    if not state.is_absolute():  # nobody's home is known
        raise PathRefused(state, "is not an absolute path", OTHER_DIRECTORY, unsafe=False)
    return private_directory(private_directory(state, OTHER_DIRECTORY) / "clusters", OTHER_DIRECTORY)
