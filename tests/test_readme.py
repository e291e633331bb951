"""Both READMEs say the same, their commands are real, and their numbers come from files that a commit names."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from string import Formatter

import pytest
from benchmarks import readme
from benchmarks.readme import CHINESE_README, LANGUAGES, OFFLOAD, README, ROOT, results_of, with_results
from benchmarks.words import CHINESE, ENGLISH, Words

from tsqp.bench.offload import MODELS as OFFLOADED_MODELS
from tsqp.bench.private import MODES
from tsqp.cli.commands import app

WITH_COMMANDS = (README, CHINESE_README, ROOT / "docs" / "usage.md")
BOTH = pytest.mark.parametrize("path", LANGUAGES, ids=lambda path: path.name)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks_of(path: Path) -> list[str]:
    """The code blocks, without comments: those are in the README's own language."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text_of(path), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r" *# .*", "", block) for block in blocks]


def commands_of(path: Path) -> list[str]:
    """Every command line, in a block or within a sentence, without what it reads."""
    lines = [command for block in blocks_of(path) for line in block.splitlines() for command in line.split("&&")]
    lines += re.findall(r"`([^`\n]+)`", text_of(path))
    return [line.partition(" < ")[0].strip() for line in lines]


@pytest.mark.parametrize("path", [*LANGUAGES, OFFLOAD], ids=lambda path: path.name)
def test_the_results_are_those_of_the_files(path: Path) -> None:
    assert with_results(text_of(path), results_of(path)) == text_of(path)


def test_the_results_are_those_of_commits() -> None:
    assert readme.unnamed_results() == []


@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["write", "check"])
@pytest.mark.parametrize("commit", ["0123abc-dirty", "unknown"])
def test_a_result_without_a_commit_is_refused_by_its_file(
    commit: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("rpc-shm", "0123abc"), ("memory", commit)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"commit": value}}))
    (tmp_path / "gpu-field.json").write_text(json.dumps({"device": "a GPU", "commit": "0123abc"}))
    before = {path: path.read_bytes() for path in (*LANGUAGES, OFFLOAD)}
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["readme", *arguments])
    with pytest.raises(SystemExit, match=r"measure again: memory\.json$"):
        readme.main()
    assert {path: path.read_bytes() for path in before} == before


def test_a_result_that_names_no_commit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu-field.json").write_text(json.dumps({"device": "a GPU", "commit": None}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.unnamed_results() == ["gpu-field.json"]


def test_each_language_says_the_same_with_the_same_figures() -> None:
    def fields(text: str) -> Counter[tuple[str | None, str | None]]:
        return Counter((name, form) for _, name, form, _ in Formatter().parse(text) if name is not None)

    assert {name: fields(text) for name, text in CHINESE.items()} == {
        name: fields(text) for name, text in ENGLISH.items()
    }


def test_each_mode_and_model_has_its_words() -> None:
    assert {*MODES.values(), *readme.MODELS.values(), *readme.OFFLOADED.values()} <= set(ENGLISH)
    assert set(readme.OFFLOADED) == set(OFFLOADED_MODELS.values())


@pytest.mark.parametrize("words", LANGUAGES.values(), ids=["English", "Chinese"])
def test_an_offload_case_is_a_row_with_its_figures(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"model": "synthetic:llama-3.2-1b", "sequences": 1, "tokens": 1, "context": 1024}
    times = {"local_s": 0.17, "local_int8_s": 0.085, "trusted_s": 0.01, "limit_s": 0.002}
    case = {**shape, **times, "gain": 17.0, "gain_int8": 8.54, "gain_tee": 6.0}
    cases = [
        case,
        {**case, "sequences": 16, "llama_cpp_s": 0.09},
        {**case, "tokens": 1024, "context": 0, "local_s": 2.5},
    ]
    result = {"runs": 5, "threads": 2, "cases": cases, "machine": {"cpu": "a CPU", "commit": "0123abc"}}
    (tmp_path / "offload.json").write_text(json.dumps(result))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    setting, _, *short, _ = readme.offload_lines(words)
    assert "0123abc" in setting
    assert len(short) == 4
    columns, rule, *rows = readme.offload_table(cases, words)
    assert short == [columns, rule, rows[0], rows[2]], "many sequences are for docs/offload.md"
    assert columns.count("|") == rule.count("|") == rows[0].count("|") == 10
    assert rows[0].endswith("| 170 ms | 85 ms | – | 10 ms | **17.0** | 8.5 | 6.0 | 2 ms |")
    assert "16" in rows[1]
    assert "| 85 ms | 90 ms | 10 ms |" in rows[1]
    assert "| 2.50 s |" in rows[2]


def test_what_the_readmes_say_of_decode_is_what_was_measured() -> None:
    """One sequence decodes faster than at ``open`` in bfloat16, about as fast as in int8; 16 at once are slower."""
    names = ("private-llama-3.2-1b", "decode-llama-3.2-1b-int8", "serve-default")
    private, int8, serve = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in names
    )
    ready = private["modes"]["masked"]
    assert ready["decode_ratio"] < 0.9
    assert 0.85 < ready["decode_s"] / int8["seconds"] < 1.15
    assert serve["rates"]["masked"]["many"] < serve["rates"]["open"]["many"]


def test_both_readmes_have_the_same_code() -> None:
    assert blocks_of(CHINESE_README) == blocks_of(README)


@pytest.mark.parametrize(
    "pattern",
    [r"[0-9]+(?:\.[0-9]+)*", r"`[^`\n]+`", r"^#+ ", r"^\|"],
    ids=["figures", "code", "headings", "rows of tables"],
)
def test_both_readmes_have_the_same(pattern: str) -> None:
    english, chinese = (Counter(re.findall(pattern, text_of(path), flags=re.MULTILINE)) for path in LANGUAGES)
    assert chinese == english


def test_both_readmes_have_the_same_links_and_lead_to_each_other() -> None:
    english, chinese = (re.findall(r"\]\(([^)]+)\)", text_of(path)) for path in LANGUAGES)
    assert (english[0], chinese[0]) == ("README.zh.md", "README.md")
    assert sorted(link.replace(".zh.", ".") for link in chinese) == sorted(
        link.replace(".zh.", ".") for link in english
    )


def test_both_pictures_are_drawn_alike() -> None:
    english, chinese = (
        re.sub(r">[^<>]+<|font-family=\"[^\"]*\"", "", text_of(ROOT / "docs" / name))
        for name in ("split.svg", "split.zh.svg")
    )
    assert chinese == english


@BOTH
def test_the_first_commands_come_first_and_not_audited_soon_after(path: Path) -> None:
    assert blocks_of(path)[0].split("\n") == ["make run", ".venv/bin/tsqp serve --console", "make test", ""]
    assert text_of(path).index("> **") < text_of(path).index("\n## ")


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_each_command_is_one_that_the_command_line_takes(path: Path) -> None:
    commands = [shlex.split(line)[1:] for line in commands_of(path) if line.startswith(("tsqp ", ".venv/bin/tsqp "))]
    assert commands
    for command in commands:
        app.parse_args(command, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_each_make_target_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    assert {line.split()[1] for line in commands_of(path) if line.startswith("make ")} <= targets


@pytest.mark.slow
def test_the_example_in_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in blocks_of(README) if "import" in block)
    assert '"default"' in code
    exec(compile(code.replace('"default"', '"synthetic:tiny"'), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
