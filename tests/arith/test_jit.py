"""The folder of compiled loops is named after all that they are made of."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tsqp
from tsqp.arith import jit

PACKAGE = Path(tsqp.__file__).parent


def imported(source: Path) -> list[ast.ImportFrom]:
    """What a module takes from this package."""
    nodes = ast.walk(ast.parse(source.read_text()))
    return [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tsqp.")]


def test_no_module_with_loops_is_left_out() -> None:
    for source in PACKAGE.rglob("*.py"):
        taken = {name.name for node in imported(source) if node.module == "tsqp.arith.jit" for name in node.names}
        if taken & {"kernel", "inline"}:
            assert source.relative_to(PACKAGE).as_posix() in jit.SOURCES


def test_what_loops_take_from_elsewhere_is_not_left_out() -> None:
    for source in jit.loop_sources():
        for node in imported(source):
            assert f"{(node.module or '').removeprefix('tsqp.').replace('.', '/')}.py" in jit.SOURCES


def test_another_source_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop.py"
    monkeypatch.setattr(jit, "loop_sources", lambda: [loop])
    names = []
    for text in ("one", "other", "one"):
        loop.write_text(text)
        names.append(jit.cache_name())
    assert names[0] == names[2] != names[1]
