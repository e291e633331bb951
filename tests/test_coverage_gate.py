"""The gate of `make coverage` counts branches, package by package."""

from __future__ import annotations

import io
import json

import pytest
from scripts.coverage_gate import main


def run(monkeypatch: pytest.MonkeyPatch, files: dict[str, tuple[int, int]], *packages: str) -> int:
    report = {
        "files": {
            path: {"summary": {"covered_branches": reached, "num_branches": branches}}
            for path, (reached, branches) in files.items()
        }
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(report)))
    monkeypatch.setattr("sys.argv", ["coverage_gate", "--floor", "95", *packages])
    return main()


def test_a_package_at_the_floor_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, {"src/a/x.py": (9, 10), "src/a/y.py": (10, 10), "src/ab/z.py": (0, 9)}, "src/a") == 0
    assert capsys.readouterr().out == "src/a: 19 of 20 branches, 95.0 %\n"


def test_one_package_below_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, {"src/a/x.py": (1000, 1000), "src/b/y.py": (18, 20)}, "src/a", "src/b") == 1


def test_a_package_that_was_not_measured_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, {"src/a/x.py": (10, 10)}, "src/a", "src/renamed") == 1
