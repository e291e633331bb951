"""The form of an answer, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Result

Command = Callable[..., Result]
LOCAL = ("--protection", "local")


def test_an_answer_has_the_form_that_was_asked_for(tsqp: Command, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["Paris", "Lyon"]}', encoding="utf-8")
    result = tsqp("generate", "What is the capital of France?", *LOCAL, "--json-schema", schema)
    assert result.code == 0
    assert result.out in ('"Paris"\n', '"Lyon"\n')


WRONG = {
    "two forms": (["--regex", "a", "--grammar", "{file}"], "--regex and --grammar exclude each other"),
    "a form without an end": (["--regex", "a", "--ignore-eos"], "--ignore-eos and --regex exclude each other"),
    "no file": (["--json-schema", "/nowhere/x"], "--json-schema: cannot read /nowhere/x"),
    "no text": (["--grammar", "{bytes}"], "is not UTF-8 text"),
    "no JSON": (["--json-schema", "{file}"], "--json-schema must be JSON: look at character 1"),
    "an empty expression": (["--regex", ""], "--regex must be text of 1 to"),
    "a bad expression": (["--regex", "("], "--regex cannot be used: unclosed group"),
    "a bad grammar": (["--grammar", "{file}"], "--grammar cannot be used: "),
    "no text has it": (["--regex", r"[^\s\S]", *LOCAL], "--regex cannot be used: no text has this form"),
    "a penalty out of range": (["--frequency-penalty", "3"], "--frequency-penalty must be at least -2"),
    "a temperature out of range": (["--temperature", "2.5"], "--temperature must be at least 0 and at most 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_forms_are_one_line_with_the_flag(tsqp: Command, tmp_path: Path, name: str) -> None:
    arguments, words = WRONG[name]
    (tmp_path / "file").write_text("frob", encoding="utf-8")
    (tmp_path / "bytes").write_bytes(b"\xff")
    paths = {kind: tmp_path / kind for kind in ("file", "bytes")}
    result = tsqp(
        "generate", "x", *(argument.format(**paths) if "{" in argument else argument for argument in arguments)
    )
    assert result.code == 2
    assert words in result.error
    assert result.out == ""
    # Before anything is opened, but for what only a tokenizer finds out.
    assert ("protection" in result.err) == (LOCAL[0] in arguments)
