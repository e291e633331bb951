"""What is told before a model is opened: its mode, and that a first start takes long."""

from __future__ import annotations

from pathlib import Path

from tsqp.api.config import ComputeConfig, RunConfig
from tsqp.api.plan import Plan
from tsqp.cli.open_llm import _lines


def test_the_first_start_is_announced_and_no_other(tmp_path: Path) -> None:
    kept = tmp_path / "kernels"
    compute = ComputeConfig(kernel_cache=str(kept))
    plan = Plan.of(RunConfig(compute=compute))
    mode, told = (line for line, _ in _lines(plan))
    assert mode.startswith("protection masked")
    assert told == "no compiled loops are kept yet: this start compiles them, for a minute or more"
    kept.mkdir()
    assert [line for line, _ in _lines(plan)] == [mode]


def test_a_start_that_keeps_nothing_is_not_announced(tmp_path: Path) -> None:
    compute = ComputeConfig(compiled_kernels=False, kernel_cache=str(tmp_path / "kernels"))
    assert len(list(_lines(Plan.of(RunConfig(protection="open", compute=compute))))) == 1
