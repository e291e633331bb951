"""How busy a GPU is, as ``nvidia-smi`` says it; here something that speaks like it."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest
import torch
from benchmarks import gpu_use
from benchmarks.gpu_use import LEAST, NotTold, shares_between, use_during

from tests.commands import wait_until


def speaker(code: str) -> tuple[str, ...]:
    return sys.executable, "-u", "-c", code


SAYS = speaker("import sys\nfor share in [7] * 3 + [80] * 100_000: print(share)\nsys.stdin.read()")


def test_only_what_was_said_meanwhile_counts() -> None:
    lines = [(1.0, "10\n"), (2.0, "80\n"), (3.0, "[N/A]\n"), (4.0, " 100\n"), (5.0, "20\n")]
    assert shares_between(lines, 1.5, 4.5) == [0.8, 1.0]


class Looks:
    """A clock that goes on by a second each time that the test's own thread looks at it; others note lines by it."""

    def __init__(self) -> None:
        self.seconds = self.lines = 0
        self._own = threading.current_thread()

    def monotonic(self) -> float:
        if threading.current_thread() is self._own:
            self.seconds += 1
        else:
            self.lines += 1
        return float(self.seconds)


def test_work_goes_on_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, took = Looks(), itertools.count()
    monkeypatch.setattr(gpu_use, "time", clock)

    def work() -> float:
        """Lasts until a line has been read meanwhile, and one more was begun to be."""
        read = clock.lines
        wait_until(lambda: clock.lines >= read + 2)
        return float(next(took))

    found = use_during(work, SAYS, seconds=LEAST, period_s=0.0)
    assert set(found.shares) <= {0.07, 0.8}
    assert len(found.shares) >= LEAST
    assert found.runs == [float(n) for n in range(LEAST)]


def test_a_command_that_says_nothing_is_named() -> None:
    with pytest.raises(NotTold, match=r"has said 0 times how busy the GPU is, at least 5 are needed"):
        use_during(lambda: 0.0, speaker("print('N/A')"), seconds=0.0, period_s=0.0)
    with pytest.raises(NotTold, match="no-such-command cannot be started: No such file"):
        use_during(lambda: 0.0, ["no-such-command"])


def test_what_fails_ends_the_command_too() -> None:
    def fail() -> float:
        raise KeyError("a worker that is lost")

    with pytest.raises(KeyError):
        use_during(fail, SAYS)


def test_without_a_device_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_use"])
    assert gpu_use.main() == 1
    assert capsys.readouterr() == ("", "gpu-use: there is no CUDA device here\n")
