"""Every rule, as the command line says it: by the name of the flag, in one line, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Result
from tests.families import tiny_model
from tests.refusals import BAD_VALUES, Refused, conflicts, unused
from tsqp.api.rules import CONFLICTS, Unused
from tsqp.cli.flags import flag_of

MODEL = ("--model", str(tiny_model("llama").directory))
Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.api.parties.LocalWorker", None)


@pytest.mark.parametrize(
    ("name", "text"), [(name, text or str(value)) for name, value, text in BAD_VALUES], ids=lambda one: str(one)
)
def test_a_value_that_cannot_be_is_refused(tsqp: Command, name: str, text: str) -> None:
    result = tsqp("generate", "hello", *MODEL, f"{flag_of(name)}={text}")
    assert result.code == 2
    assert flag_of(name) in result.error
    assert name not in result.error or "." not in name


@pytest.mark.parametrize(("rule", "refused"), unused())
def test_what_would_play_no_part_is_refused(tsqp: Command, rule: Unused, refused: Refused) -> None:
    mode = refused.run.protection
    result = tsqp("generate", "hello", *MODEL, "--protection", mode, *refused.flags)
    assert result.code == 2
    assert f"{rule.why.format(mode=mode)}: leave out {flag_of(refused.fields[0])}" in result.error


@pytest.mark.parametrize("index", range(len(CONFLICTS)), ids=lambda index: CONFLICTS[index].says[:40])
def test_what_cannot_be_together_is_refused(tsqp: Command, index: int, tmp_path: Path) -> None:
    _, refused = conflicts(tmp_path)[index]
    result = tsqp("generate", "hello", *MODEL, "--protection", refused.run.protection, *refused.flags)
    assert result.code == 2
    assert all(flag_of(name) in result.error for name in refused.fields)
    assert "guard." not in result.error
    assert "worker." not in result.error
