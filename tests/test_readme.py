"""Numbers in the README come from files under benchmarks/results/."""

from __future__ import annotations

from benchmarks.readme import README, with_table


def test_the_results_are_those_of_the_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text


def test_the_two_commands_come_first() -> None:
    first_block = README.read_text(encoding="utf-8").split("```")[1]
    commands = [line.split("#")[0].strip() for line in first_block.strip().splitlines()]
    assert commands == ["make run", "make test"]
