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
    subprocess.run([sys.executable, "-m", "benchmarks.lost_worker", *options], cwd=REPOSITORY, check=True, timeout=120)
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["started here", "spare", "standby"]
    assert rows["started here"]["start_s"] > 0
    for row in rows.values():
        assert min(row["vectors_s"], row["greeting_s"], row["rest_s"]) > 0
        both = max(row["start_s"], row["vectors_s"])  # the vectors are made while the worker starts
        assert row["pause_s"] == pytest.approx(both + row["greeting_s"] + row["rest_s"])
