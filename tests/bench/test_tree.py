"""Results are kept only where a commit names the code that was measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Result
from tsqp.bench import tree
from tsqp.bench.tree import commit
from tsqp.errors import OptionError

Command = Callable[..., Result]

COMMANDS = {
    "private": ("private", "-m", "synthetic:tiny", "--results"),
    "guard": ("guard", "-m", "synthetic:tiny", "--results"),
    "all": ("all", "--models", "synthetic:tiny", "--results"),
}


def git(where: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], cwd=where, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source file in a checkout of its own, beside a result and an ignored folder."""
    source, result = tmp_path / "src" / "code.py", tmp_path / tree.NOT_CODE / "rpc.json"
    for path in (source, result, tmp_path / "README.md"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n")
    (tmp_path / ".gitignore").write_text("/.venv/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--no-verify", "--message", "first")
    return source


def test_a_clean_tree_is_its_commit(source: Path) -> None:
    assert git(source.parent, "rev-parse", "HEAD").startswith(commit(source))
    assert len(commit(source)) >= 7


@pytest.mark.parametrize("changed", ["src/code.py", "README.md", "src/new.py", "new.py"])
def test_a_change_anywhere_is_dirty(source: Path, changed: str) -> None:
    clean = commit(source)
    (source.parents[1] / changed).write_text("second\n")
    assert commit(source) == f"{clean}-dirty"


def test_a_removed_file_is_dirty(source: Path) -> None:
    (source.parents[1] / "README.md").unlink()
    assert commit(source).endswith("-dirty")


def test_what_is_staged_is_dirty(source: Path) -> None:
    source.write_text("second\n")
    git(source.parent, "add", "code.py")
    assert commit(source).endswith("-dirty")


def test_untracked_files_count_even_where_git_is_told_to_hide_them(source: Path) -> None:
    git(source.parent, "config", "status.showUntrackedFiles", "no")
    (source.parent / "new.py").write_text("second\n")
    assert commit(source).endswith("-dirty")


@pytest.mark.parametrize("changed", [f"{tree.NOT_CODE}/rpc.json", f"{tree.NOT_CODE}/new.json", ".venv/new.py"])
def test_results_and_ignored_files_are_not_code(source: Path, changed: str) -> None:
    clean = commit(source)
    path = source.parents[1] / changed
    path.parent.mkdir(exist_ok=True)
    path.write_text("second\n")
    assert commit(source) == clean


def test_a_package_in_somebody_elses_checkout_has_no_commit(source: Path) -> None:
    package = source.parents[1] / ".venv" / "code.py"
    package.parent.mkdir()
    package.write_text("first\n")
    assert commit(package) == "unknown"


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path / "code.py") == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit() == "unknown"


def test_the_repository_of_a_hook_is_not_asked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = commit(source)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit(source) == clean


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_dirty_tree_is_refused_before_anything_is_measured(
    kind: str, tsqp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "commit", lambda: "0123abc-dirty")
    result = tsqp("bench", *COMMANDS[kind], tmp_path)
    assert result.code == 2
    assert "0123abc" in result.error
    assert "--dirty-ok" in result.error
    assert "limits of this machine" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_dirty_ok_writes_a_result_that_says_so(tsqp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "commit", lambda: "0123abc-dirty")
    monkeypatch.setattr("tsqp.bench.guard.WEIGHTS_BYTES", 2**16)
    quick = ("--tokens", 20, "--runs", 1, "--threads", 1)
    assert tsqp("bench", *COMMANDS["guard"], tmp_path, "--dirty-ok", *quick).code == 0
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["machine"]["commit"] == "0123abc-dirty"


@pytest.mark.parametrize("dirty_ok", [False, True])
def test_without_a_commit_nothing_is_written(dirty_ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "commit", lambda: "unknown")
    with pytest.raises(OptionError, match="not that of a git checkout"):
        tree.check_tree(dirty_ok=dirty_ok)


def test_without_a_commit_a_result_is_printed(tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "commit", lambda: "unknown")
    quick = ("--bytes", 4096, "--calls", 10, "--runs", 1)
    assert tsqp("bench", "rpc", "--transport", "mem", *quick, "--json").json["machine"]["commit"] == "unknown"


def test_dirty_ok_without_results_is_refused_by_name(tsqp: Command) -> None:
    assert "--dirty-ok" in tsqp("bench", "guard", "-m", "synthetic:tiny", "--dirty-ok").error


@pytest.mark.parametrize("name", ["startup", "memory", "quality"])
def test_scripts_refuse_it_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    monkeypatch.setattr(tree, "commit", lambda: "0123abc-dirty")
    monkeypatch.setattr("sys.argv", [name])
    with pytest.raises(SystemExit, match="--dirty-ok"):
        import_module(f"benchmarks.{name}").main()
