"""Scripts that measure inside of the program: what they put themselves between must be what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_pauses_after_a_lost_worker_have_their_parts(tmp_path: Path) -> None:
    output = tmp_path / "lost.json"
    options = ["--model", "synthetic:tiny", "--runs", "1", "--dirty-ok", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "benchmarks.lost_worker", *options], cwd=REPOSITORY, check=True)
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["started here", "spare", "standby"]
    assert rows["started here"]["start_s"] > 0
    for row in rows.values():
        assert min(row["vectors_s"], row["greeting_s"]) > 0
        both = max(row["start_s"], row["vectors_s"])  # the vectors are made while the worker starts
        assert row["pause_s"] == pytest.approx(both + row["greeting_s"] + row["rest_s"])
        assert row["rest_s"] < row["pause_s"]  # on a busy machine below zero: the greeting is beside the vectors too


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["masked", "open"])
def test_an_adapter_is_measured_in_turn(protection: str, tmp_path: Path) -> None:
    output = tmp_path / "lora.json"
    options = ["--model", "synthetic:tiny", "--runs", "2", "--steps", "4", "--protection", protection, "--dirty-ok"]
    command = [sys.executable, "-m", "benchmarks.lora", *options, "--output", str(output)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    found = json.loads(output.read_text())
    bare, own = found["rows"]["without"], found["rows"]["with"]
    assert (bare["prefill_lora_s"], bare["decode_lora_s"]) == (0, 0)
    assert 0 < own["decode_lora_s"] < own["decode_s"]
    assert 0 < own["prefill_lora_s"] < own["prefill_s"]
    assert len(own["all_decode_s"]) == len(bare["all_decode_s"]) == 2
    assert found["ratio"] > 0
