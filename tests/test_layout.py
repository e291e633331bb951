"""Tests stand on their own: what several share lies in a module that is no test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
IMPORT = re.compile(r"^\s*(?:from|import)\s+(?:tests\.[\w.]*|\.[\w.]*)test_\w+", re.MULTILINE)


def test_no_test_file_imports_another() -> None:
    found = {str(path.relative_to(TESTS)): IMPORT.findall(path.read_text("utf-8")) for path in TESTS.rglob("*.py")}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_such_an_import_would_be_found() -> None:
    for line in ("from tests.cli.test_x import A", "    from .test_x import A", "import tests.cli.test_x"):
        assert IMPORT.search(line)
    assert not IMPORT.search("from tests.cli.commands import test")
