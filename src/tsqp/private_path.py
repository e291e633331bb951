"""May what lies at this path be trusted? One answer for sockets, arenas, keys and compiled code.

Rules, in the order in which they are looked at:

1. Every directory from ``/`` down belongs to this user or to root, and nobody else may write to it. One with the sticky
   bit may be open to all, as ``/tmp`` is: what belongs to this user cannot be moved or removed there by others.
2. A symbolic link on the way belongs to this user or to root; what the link leads to is held to rule 1.
3. The thing itself has the owner, the kind and the mode that its ``Rule`` says, and is no link.

Why names are safe after the check: rules are applied from ``/`` down, so only this user and root could exchange a name
between check and use. Files are opened without following links, and checked once more through their descriptor.

Assumes: root and other processes of this user are trusted; a file system tells the truth about owners and modes (an
access list shows in the bits of the group). In a user namespace an owner without a number in there counts as root in
rules 1 and 2: the system's own directories have no other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tsqp.errors import PathRefused

DIRECTORY_MODE, FILE_MODE = 0o700, 0o600
_NOBODY = 65_534


class Rule(NamedTuple):
    """What is asked of one thing. ``remedy`` says what to do about a mode with ``forbidden`` bits."""

    kind: str
    is_kind: Callable[[int], bool]
    forbidden: int
    remedy: str
    root_may_own: bool = False  # root can change everything anyway
    sticky_is_enough: bool = False


ABOVE = Rule("a directory", stat.S_ISDIR, 0o022, "chmod go-w {path}", root_may_own=True, sticky_is_enough=True)
HOLDER = ABOVE._replace(sticky_is_enough=False)  # of names that others must not take first
DIRECTORY = Rule("a directory", stat.S_ISDIR, 0o077, "remove it")  # this package made it, and makes it again
FILE = Rule("a regular file", stat.S_ISREG, 0o077, "chmod 600 {path}")
SOCKET = Rule("a socket", stat.S_ISSOCK, 0, "")  # the kernel is asked who connects


def problem_with(info: os.stat_result, rule: Rule) -> str | None:
    """What speaks against a thing whose ``lstat`` or ``fstat`` this is; None where nothing does."""
    if not rule.is_kind(info.st_mode):
        return "is a symbolic link" if stat.S_ISLNK(info.st_mode) else f"is not {rule.kind}"
    if info.st_uid != os.geteuid() and not (rule.root_may_own and _counts_as_root(info.st_uid)):
        return "belongs to another user"
    if info.st_mode & rule.forbidden and not (rule.sticky_is_enough and info.st_mode & stat.S_ISVTX):
        return f"is open to others (mode {stat.S_IMODE(info.st_mode):o})"
    return None


def check(path: Path, rule: Rule, instead: str, info: os.stat_result | None = None) -> None:
    """Raise PathRefused unless a thing keeps its rule; rule 1 is left out. ``instead``: what else a user can do."""
    info = path.lstat() if info is None else info
    problem = problem_with(info, rule)
    if problem is not None:
        remedy = rule.remedy.format(path=path) if problem.startswith("is open") else ""
        raise PathRefused(path, problem, " or ".join(filter(None, (remedy, instead))), unsafe=True)


def reach(path: Path, instead: str) -> Path:
    """The path without links above its last component, after rules 1 and 2. Raises PathRefused, OSError."""
    path = path.absolute()
    parent = follow(path.parent, instead)
    check(parent, ABOVE, instead)
    return parent / path.name


def follow(path: Path, instead: str) -> Path:
    """``reach``, with the last component followed as well, should it be a link."""
    path = path.absolute()
    if path == path.parent:
        return path
    here = reach(path, instead)
    if path.name == "..":
        return here.parent.parent
    if stat.S_ISLNK(here.lstat().st_mode):
        here.stat()  # the kernel refuses a circle of links, so that this function need not
        check(here, ABOVE._replace(is_kind=stat.S_ISLNK, forbidden=0), instead)
        return follow(here.parent / here.readlink(), instead)
    return here


def check_holder(path: Path, instead: str) -> None:
    """Raise PathRefused unless this user and root alone can make and remove names beside ``path``."""
    try:
        check(follow(path.parent, instead), HOLDER, instead)
    except OSError as error:
        raise _unusable(path.parent, error, instead) from None


def private_directory(path: Path, instead: str) -> Path:
    """A directory that nobody else can enter, made with mode 0700 when missing. Raises PathRefused."""
    path = path.absolute()
    try:
        make_directories(path.parent)
        path = reach(path, instead)
        make_directories(path, DIRECTORY_MODE)
        check(path, DIRECTORY, instead)
    except OSError as error:
        raise _unusable(path, error, instead) from None
    return path


def make_directories(path: Path, mode: int = 0o755) -> None:
    """Make a directory and what is missing above it, writable by this user alone whatever the umask. Raises OSError."""
    for directory in (*reversed(path.absolute().parents), path):
        if not os.path.lexists(directory):
            directory.mkdir(mode=mode if directory == path else 0o755, exist_ok=True)


def open_private(path: Path, flags: int, instead: str) -> int:
    """A descriptor of a file that this user alone can reach; made with mode 0600 for O_CREAT. Raises PathRefused."""
    try:
        path = reach(path, instead)
        # Without waiting: a pipe with that name would never open.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, FILE_MODE)
    except OSError as error:
        if path.is_symlink():
            raise PathRefused(path, "is a symbolic link", instead, unsafe=True) from None
        raise _unusable(path, error, instead) from None
    try:
        check(path, FILE, instead, os.fstat(fd))
    except PathRefused:
        os.close(fd)
        raise
    return fd


def _unusable(path: Path, error: OSError, instead: str) -> PathRefused:
    where = Path(os.fsdecode(error.filename)) if error.filename else path
    return PathRefused(where, f"cannot be used: {error.strerror}", instead, unsafe=False)


def _counts_as_root(uid: int) -> bool:
    return uid == 0 or (uid == _NOBODY and _nobody_is_outside())


@cache
def _nobody_is_outside() -> bool:
    """Whether this process is in a user namespace that has no user 65,534 of its own."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
    except OSError:
        return False
    return not any(int(first) <= _NOBODY < int(first) + int(count) for first, _, count in ranges)
