"""schemathesis: requests made of the server's own OpenAPI document, right ones and wrong ones.

Left out: that each request which fits the document is taken. A schema for an answer may be none, a prompt too long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.target import Target

EXAMPLES = 10  # of each operation, beside those at the bounds


@pytest.mark.timeout(900)
def test_the_server_does_what_its_document_says(target: Target, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            Path(sys.executable).with_name("st"),
            "run",
            f"{target.url}/openapi.json",
            f"--header=Authorization: Bearer {target.key}",
            "--phases=coverage,fuzzing",
            "--exclude-checks=positive_data_acceptance",
            f"--max-examples={EXAMPLES}",
            "--seed=1",
            "--request-timeout=30",
            "--no-color",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "TSQP_MODEL": target.model,
            "SCHEMATHESIS_HOOKS": "conformance.schemathesis_hooks",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
