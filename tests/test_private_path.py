"""What may be trusted on disk: each rule with each owner, kind and mode; then the directories and links on the way."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import descriptors_of
from tsqp import private_path
from tsqp.errors import PathRefused
from tsqp.private_path import (
    ABOVE,
    DIRECTORY,
    FILE,
    HOLDER,
    SOCKET,
    Rule,
    check_holder,
    follow,
    make_directories,
    open_private,
    private_directory,
    problem_with,
    reach,
)

ME = os.geteuid()
STRANGER = ME + 1_000
INSTEAD = "choose another by VARIABLE"
KINDS = {ABOVE: stat.S_IFDIR, HOLDER: stat.S_IFDIR, DIRECTORY: stat.S_IFDIR, FILE: stat.S_IFREG, SOCKET: stat.S_IFSOCK}
needs_root = pytest.mark.skipif(ME != 0, reason="only root can give a file away")


def info(kind: int, mode: int, owner: int) -> os.stat_result:
    return os.stat_result((kind | mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory straight below a sticky one that all may write to, as far from pytest's own as can be."""
    directory = Path(tempfile.mkdtemp(prefix="tsqp-p", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@given(rule=st.sampled_from(list(KINDS)), mode=st.integers(0, 0o7777), mine=st.booleans())
def test_a_mode_is_refused_for_the_bits_that_its_rule_forbids(rule: Rule, mode: int, mine: bool) -> None:
    problem = problem_with(info(KINDS[rule], mode, ME if mine else STRANGER), rule)
    others_write, others_at_all, sticky = bool(mode & 0o022), bool(mode & 0o077), bool(mode & 0o1000)
    loose = {
        ABOVE: others_write and not sticky,
        HOLDER: others_write,
        DIRECTORY: others_at_all,
        FILE: others_at_all,
        SOCKET: False,
    }[rule]
    if not mine:
        assert problem == "belongs to another user"
    else:
        assert problem == (f"is open to others (mode {mode:o})" if loose else None)


@given(
    rule=st.sampled_from(list(KINDS)),
    kind=st.sampled_from([stat.S_IFDIR, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR]),
)
def test_another_kind_is_refused(rule: Rule, kind: int) -> None:
    problem = problem_with(info(kind, 0o600, ME), rule)
    if kind == stat.S_IFLNK:
        assert problem == "is a symbolic link"
    else:
        assert (problem is None) == (kind == KINDS[rule])


@pytest.mark.parametrize("rule", list(KINDS))
def test_root_may_own_what_lies_above_and_nothing_else(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1_000)
    assert (problem_with(info(KINDS[rule], 0o700, 0), rule) is None) == (rule in (ABOVE, HOLDER))
    assert problem_with(info(KINDS[rule], 0o700, 1_000), rule) is None


@pytest.mark.parametrize("rule", list(KINDS))
@pytest.mark.parametrize("outside", [True, False])
def test_an_owner_from_outside_of_a_user_namespace_counts_as_root(
    rule: Rule, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_path, "_nobody_is_outside", lambda: outside)
    accepted = problem_with(info(KINDS[rule], 0o700, 65_534), rule) is None
    assert accepted == (outside and rule in (ABOVE, HOLDER))


def test_in_a_user_namespace_the_directories_of_the_system_are_accepted(shared: Path) -> None:
    """There ``/`` and ``/tmp`` belong to a user without a number."""
    code = f"from tsqp.private_path import *; print(private_directory(Path({str(shared)!r}) / 'own', ''))"
    command = ["unshare", "--user", f"--map-user={STRANGER}", sys.executable, "-c", code]
    probe = subprocess.run([*command[:3], "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this machine gives no user namespaces")
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == str(shared / "own"), run.stderr


# The way to it


def uses(path: Path) -> list[Callable[[], object]]:
    """Everything that takes a path, for a thing at ``path``."""
    return [
        lambda: private_directory(path, INSTEAD),
        lambda: open_private(path, os.O_RDWR | os.O_CREAT, INSTEAD),
        lambda: check_holder(path, INSTEAD),
    ]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o720, 0o702])
@pytest.mark.parametrize("below", [".", "deep", "deep/er"])
def test_a_directory_above_that_others_can_write_to_is_refused(mode: int, below: str, shared: Path) -> None:
    loose = shared / "loose"
    (loose / below).mkdir(parents=True)
    loose.chmod(mode)
    for use in uses(loose / below / "x"):
        with pytest.raises(PathRefused) as caught:
            use()
        assert str(caught.value) == f"{loose} is open to others (mode {mode:o}); chmod go-w {loose} or {INSTEAD}"
        assert (caught.value.path, caught.value.unsafe) == (loose, True)
    assert not (loose / below / "x").is_file()  # refused before it was made


def test_the_sticky_bit_is_enough_above_but_not_for_names_that_others_could_take_first(shared: Path) -> None:
    shared.chmod(0o1777)
    assert private_directory(shared / "own", INSTEAD) == shared / "own"
    os.close(open_private(shared / "file", os.O_RDWR | os.O_CREAT, INSTEAD))
    check_holder(shared / "own" / "x.sock", INSTEAD)
    with pytest.raises(PathRefused, match="chmod go-w"):
        check_holder(shared / "x.sock", INSTEAD)


@needs_root
@pytest.mark.parametrize("above", [False, True])
def test_what_belongs_to_another_user_is_refused(above: bool, shared: Path) -> None:
    makers: list[Callable[[Path], None]] = [lambda path: path.mkdir(mode=0o700), lambda path: path.touch(mode=0o600)]
    for make in makers:
        foreign = shared / "foreign"
        if above:
            foreign.mkdir(mode=0o755)
            make(foreign / "x")
        else:
            make(foreign)
        os.chown(foreign, STRANGER, STRANGER)
        for use in uses(foreign / "x" if above else foreign)[: 3 if above else 2]:
            with pytest.raises(PathRefused, match=r"foreign belongs to another user|is not a|Is a directory"):
                use()
        if foreign.is_dir():
            shutil.rmtree(foreign)
        else:
            foreign.unlink()


def test_a_link_above_is_followed_and_its_target_held_to_the_same(shared: Path) -> None:
    (shared / "target").mkdir(mode=0o700)
    (shared / "link").symlink_to("../" + shared.name + "/target")
    (shared / "absolute").symlink_to(shared / "link")
    for link in (shared / "link", shared / "absolute"):
        assert private_directory(link / "x", INSTEAD) == shared / "target" / "x"
        assert follow(link / "x" / ".." / "x", INSTEAD) == shared / "target" / "x"
        assert reach(link, INSTEAD) == link
    (shared / "target").chmod(0o770)
    for link in (shared / "link", shared / "absolute"):
        for use in uses(link / "x"):
            with pytest.raises(PathRefused, match=f"{shared}/target is open to others"):
                use()


@needs_root
def test_a_link_of_another_user_is_not_followed(shared: Path) -> None:
    (shared / "target").mkdir(mode=0o700)
    (shared / "link").symlink_to(shared / "target")
    os.chown(shared / "link", STRANGER, STRANGER, follow_symlinks=False)
    for use in uses(shared / "link" / "x"):
        with pytest.raises(PathRefused, match="link belongs to another user"):
            use()


def test_a_circle_of_links_ends(shared: Path) -> None:
    (shared / "a").symlink_to("b")
    (shared / "b").symlink_to("a")
    for use in uses(shared / "a" / "x"):
        with pytest.raises(PathRefused, match="Too many levels"):
            use()


# The thing itself


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_what_is_made_is_private_and_lets_nobody_write_above_it(umask: int, shared: Path) -> None:
    before = os.umask(umask)
    try:
        directory = private_directory(shared / "a" / "b" / "own", INSTEAD)
        os.close(open_private(directory / "file", os.O_RDWR | os.O_CREAT, INSTEAD))
        make_directories(shared / "c" / "d")
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "file").stat().st_mode) == 0o600
    for made in ("a", "a/b", "c", "c/d"):
        assert stat.S_IMODE((shared / made).stat().st_mode) == 0o755 & ~umask
    assert private_directory(directory, INSTEAD) == directory


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o750, 0o701, 0o1777])
def test_a_directory_that_others_can_enter_is_not_private(mode: int, shared: Path) -> None:
    (shared / "own").mkdir()
    (shared / "own").chmod(mode)
    with pytest.raises(PathRefused, match=f"open to others .mode {mode:o}.; remove it or {INSTEAD}"):
        private_directory(shared / "own", INSTEAD)


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o640, 0o604, 0o601])
def test_a_file_that_others_can_reach_is_not_private(mode: int, shared: Path) -> None:
    (shared / "file").touch()
    (shared / "file").chmod(mode)
    with pytest.raises(PathRefused, match=f"chmod 600 {shared}/file or {INSTEAD}"):
        open_private(shared / "file", os.O_RDONLY, INSTEAD)
    assert descriptors_of(shared / "file") == []


def test_the_last_component_is_never_a_link(shared: Path) -> None:
    (shared / "directory").mkdir(mode=0o700)
    (shared / "file").touch(mode=0o600)
    for target in ("directory", "file", "missing"):
        (shared / "link").symlink_to(target)
        for use in uses(shared / "link")[:2]:
            with pytest.raises(PathRefused, match="link is a symbolic link"):
                use()
        assert not (shared / "missing").exists()
        (shared / "link").unlink()


def test_a_pipe_is_no_file_and_keeps_nobody_waiting(shared: Path) -> None:
    os.mkfifo(shared / "pipe", 0o600)
    with pytest.raises(PathRefused, match="is not a regular file"):
        open_private(shared / "pipe", os.O_RDWR, INSTEAD)


def test_what_the_system_refuses_is_not_called_unsafe(shared: Path) -> None:
    (shared / "file").touch()
    missing: Callable[[], object] = lambda: open_private(shared / "missing", os.O_RDONLY, INSTEAD)  # noqa: E731
    for use in (*uses(shared / "file" / "x"), missing):
        with pytest.raises(PathRefused, match=str(shared)) as caught:
            use()
        assert caught.value.unsafe == ("is not a directory" in caught.value.problem)
