"""The vectors are the package's, and an independent program of few lines agrees with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import LIMIT_S
from tests.vectors import make
from tsqp.arith.modulus import P

VERIFIER = Path(__file__).with_name("verify.py")
SECTIONS = ("quantise", "limit", "product", "masked", "check", "expand", "ratchet")


def verify(*arguments: Path) -> subprocess.CompletedProcess[str]:
    """With no site packages and no path: only Python's own library can be imported."""
    command = [sys.executable, "-I", "-S", str(VERIFIER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def load() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(make.FILE.read_text())
    return loaded


def changed(value: Any) -> Any:
    """The same with its last number, letter or truth value another one."""
    match value:
        case dict():
            last = list(value)[-1]
            return {**value, last: changed(value[last])}
        case list():
            return [*value[:-1], changed(value[-1])]
        case bool():
            return not value
        case int():
            return value + 1
        case _:
            return value[:-1] + ("0" if value[-1] != "0" else "1")


def test_the_verifier_agrees_with_the_file() -> None:
    result = verify()
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(SECTIONS)
    assert all(line.endswith("cases agree") for line in lines)


def test_the_file_is_what_the_package_makes() -> None:
    assert make.FILE.read_text() == make.text(), "run python -m tests.vectors.make, and say why the vectors changed"


def test_every_section_is_verified() -> None:
    assert tuple(load()) == SECTIONS


def test_the_verifier_is_short() -> None:
    lines = [line for line in VERIFIER.read_text().splitlines() if line.strip()]
    assert len(lines) <= 100


@pytest.mark.parametrize("section", SECTIONS)
def test_a_changed_vector_is_found(section: str, tmp_path: Path) -> None:
    vectors = load()
    vectors[section][-1]["out"] = changed(vectors[section][-1]["out"])
    file = tmp_path / "guard.json"
    file.write_text(json.dumps(vectors))
    result = verify(file)
    assert result.returncode == 1
    differing = [line for line in result.stdout.splitlines() if line.endswith("differ")]
    assert differing == [f"{section} cases [{len(vectors[section]) - 1}] differ"]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_no_agreement(section: str, tmp_path: Path) -> None:
    file = tmp_path / "guard.json"
    for vectors in ({**load(), section: []}, {name: cases for name, cases in load().items() if name != section}):
        file.write_text(json.dumps(vectors))
        assert verify(file).returncode != 0


def test_the_vectors_reach_the_edges() -> None:
    """Vectors that miss what can go wrong would agree with code that is wrong."""
    vectors = load()
    assert {case["out"]["verdict"] for case in vectors["check"]} == {"accept", "ProductMismatch", "ReplyRangeError"}
    assert {case["in"]["digits"] for case in vectors["product"]} == {2, 4}
    assert {case["out"]["refused"] for case in vectors["limit"]} == {True, False}
    stream = bytes.fromhex(vectors["expand"][-1]["in"]["stream"])
    words = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)]
    elements = vectors["expand"][-1]["in"]["n"]
    for part in (words[:elements], words[elements:]):  # p among the elements, and among those that replace it
        assert {P, P | 1 << 31} <= set(part)


def test_one_vector_of_the_check_would_miss_what_two_find() -> None:
    """A wrong reply of the vectors satisfies the first equation: only the second gives it away."""
    missed = 0
    for case in (case for case in load()["check"] if case["out"]["verdict"] == "ProductMismatch"):
        given, w_s = case["in"], case["out"]["w_s"]
        rows = zip(given["y"], given["x"], strict=True)
        missed += all((dot(y, given["s"][0]) - dot(x, w_s[0])) % P == 0 for y, x in rows)
    assert missed == 1


def dot(a: list[int], b: list[int]) -> int:
    return sum(i * j for i, j in zip(a, b, strict=True))
