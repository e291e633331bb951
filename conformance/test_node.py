"""npm's openai and ai, by node's own test runner: conformance/node."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conformance.target import Target

HERE = Path(__file__).parent / "node"


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("*.test.mjs")))
def test_of_node(target: Target, file: str) -> None:
    node = shutil.which("node")
    assert node is not None, "conformance needs node 20 or later"
    told = {
        "TSQP_API": target.api,
        "TSQP_KEY": target.key,
        "TSQP_MODEL": target.model,
        "TSQP_METRICS": target.metrics_url,
    }
    done = subprocess.run(
        [node, "--test", "--test-timeout=60000", "--test-concurrency=1", file],
        cwd=HERE,
        env={**os.environ, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
