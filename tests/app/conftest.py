"""A home for each test, and the command inside this process for what needs no process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.app.commands import Home, Result
from tsqp.app.main import run


@pytest.fixture
def home() -> Iterator[Home]:
    home = Home()
    yield home
    home.remove()


@pytest.fixture
def tsqp(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command without a process: saves the seconds that loading torch takes."""
    monkeypatch.setattr("os.environ", dict(home.environment))

    def call(*arguments: object) -> Result:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
