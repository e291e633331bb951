"""What has to be read to believe the guard stays small, and depends on little."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

import tsqp
from tests.fresh_interpreter import loaded, modules_after

PACKAGE = Path(tsqp.__file__).parent
GUARD = sorted((PACKAGE / "trusted" / "guard").glob("*.py"))
ARITHMETIC = [PACKAGE / "arith" / f"{name}.py" for name in ("field", "digits", "expand", "product")]
MOST_LINES = 600

ALLOWED = (
    *("numpy", "torch", "tsqp.config", "tsqp.errors", "tsqp.arith", "tsqp.trusted.guard"),
    *("tsqp.wire.messages", "tsqp.wire.slot"),
)
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def code_lines(source: str) -> int:
    """Lines with code: no blank lines, comments, docstrings or imports."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines - docstring_lines(tree))


def test_lines_are_counted_as_said() -> None:
    source = '"""Doc\n\nstring."""\n\nimport os\n\n# comment\nx = 1  # comment\ny = (\n    2,\n)\n'
    assert code_lines(source) == 4
    assert code_lines(source + '\n\ndef f():\n    """Doc."""\n    return 3\n') == 6


def test_the_guard_is_small() -> None:
    sizes = {path.name: code_lines(path.read_text()) for path in (*GUARD, *ARITHMETIC)}
    assert sum(sizes.values()) <= MOST_LINES, sizes


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", GUARD, ids=lambda path: path.stem)
def test_the_guard_imports_what_it_may(path: Path) -> None:
    def allowed(name: str) -> bool:
        standard = name.split(".")[0] in sys.stdlib_module_names
        return standard or any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED)

    assert not [name for name in imports_of(path) if not allowed(name)]
    assert not {"random", "secrets", "pickle", "socket", "multiprocessing"} & imports_of(path)


@pytest.mark.parametrize(
    "forbidden",
    ["tsqp.cli", "tsqp.untrusted", "tsqp.model", "tsqp.checkpoint", "tsqp.wire.transport", "tsqp.wire.codec", "zmq"],
)
def test_the_guard_loads_no_more(forbidden: str) -> None:
    assert not loaded(modules_after("import tsqp.trusted.guard.linears"), forbidden)


def test_the_guard_loads_nothing_else_of_the_trusted_side() -> None:
    modules = loaded(modules_after("import tsqp.trusted.guard.linears"), "tsqp.trusted")
    assert all(name == "tsqp.trusted" or name.startswith("tsqp.trusted.guard") for name in modules)
