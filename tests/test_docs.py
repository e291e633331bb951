"""What the documents name exists: files, and functions where a sentence names them beside their file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tsqp"
HISTORY = ("log.md",)  # what was true on its day; so is the changelog
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md"))
    if path.name not in (*HISTORY, "CHANGELOG.md")
)
# Where a path may begin: at the root, in the package, among the tests, beside the guard, beside the page.
BESIDE = (ROOT, PACKAGE, PACKAGE / "trusted" / "guard", ROOT / "tests", ROOT / "tests" / "trusted" / "guard")
ELSEWHERE = {
    "adapter_config.json",
    "prompt.txt",
    "FILE.png",
    "compiled-worker/",
    "kernels/",
    "worker-kernels/",
    "test-kernels/",
    "uv.lock",
    "poetry.lock",
    "gpu-NAME.json",
    "gpu-check.json",
}  # of users, of other tools, of a machine with a GPU
SUFFIXES = r"py|md|json|toml|txt|lock|png|svg|yml|yaml"

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def files_of(text: str) -> set[str]:
    """Paths in code spans and links: names with a known suffix, and folders, which end with a slash."""
    spans = re.findall(r"`([^`\n]+)`", text)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.compile(rf"[\w.][\w./-]*(?:\.(?:{SUFFIXES})|/)")
    words = {word for span in spans for word in span.split()}
    return {word for word in words if named.fullmatch(word) and "://" not in word} | {link for link in links if link}


def exists(name: str, page: Path) -> bool:
    return any((folder / name).exists() for folder in (*BESIDE, page.parent))


def names_of(path: Path) -> set[str]:
    """Functions, classes and methods of a module, as ``name`` and ``Class.method``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
    return names


@document
def test_each_file_that_a_document_names_exists(path: Path) -> None:
    missing = sorted(
        name for name in files_of(path.read_text(encoding="utf-8")) if not exists(name, path) and name not in ELSEWHERE
    )
    assert missing == []


@document
def test_each_function_that_a_document_names_beside_its_file_exists(path: Path) -> None:
    found = re.findall(r"`([\w/]+\.py)`:\s+(`[\w.]+`(?:,\s+`[\w.]+`)*)", path.read_text(encoding="utf-8"))
    missing = [
        f"{module}: {name}"
        for module, names in found
        for name in re.findall(r"`([\w.]+)`", names)
        if name.partition(".")[0] not in SUFFIXES and name not in names_of(PACKAGE / module)
    ]
    assert missing == []


def test_each_test_that_a_module_names_exists() -> None:
    """A security module says what it covers, and by which test."""
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    named = {
        (path.name, name)
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"\btest_\w+\.py", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    }
    assert len(named) >= 10
    assert sorted(entry for entry in named if entry[1] not in tests) == []


@document
def test_tables_are_whole(path: Path) -> None:
    """A row after an empty line is text to whoever shows the page; a row with other cells than its header's is cut."""
    text = path.read_text(encoding="utf-8")
    for table in re.finditer(r"^\|.*\n(?:\|.*\n?)*", text, re.MULTILINE):
        rows = table[0].splitlines()
        assert re.fullmatch(r"[|:\s-]+", rows[1] if len(rows) > 1 else ""), f"no header: {rows[0]}"
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(cells) == 1, rows[0]


def test_the_list_of_decisions_has_each_page() -> None:
    listed = re.findall(
        r"^\| \[\d{4}\]\((.+?)\)", (ROOT / "docs/adr/README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert listed == sorted(path.name for path in (ROOT / "docs/adr").glob("0*.md"))


def test_the_lives_in_the_design_name_functions() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for title, steps in (("The life of a request", 8), ("The life of a pad", 6)):
        life = text.partition(title)[2].partition("\n## ")[0]
        assert len(re.findall(r"^\d\. \*\*", life, flags=re.MULTILINE)) == steps
        assert len(re.findall(r"`[\w/]+\.py`:\s+`", life)) >= steps


def test_the_listing_of_the_design_has_each_folder() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listing = text.partition("src/tsqp/  ")[2].partition("```")[0]
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"\b(\w+)/", listing)) >= folders


def test_files_are_found_as_said() -> None:
    text = "`tests/x.py`, `src/a/`, `a b/c.py d`, [x](y.md#part), [z](https://a.org/b.md), `T·H/2`, `.md`"
    assert files_of(text) == {"tests/x.py", "src/a/", "b/c.py", "y.md"}
