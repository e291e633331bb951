"""Evidence of real processors that others published: a directory beside the repository, and never in it.

``TSQP_EVIDENCE`` names the directory. Without it the tests that read from there are skipped, each by its name. In it:

- ``tdx/quote.bin``, ``tdx/collateral.json``, and the same in ``sgx/``: of Phala-Network/dcap-qvl, ``sample/``; valid
  from 2025-06-19 to 2025-07-19.
- ``snp/milan_v2_debug_report.bin``, ``snp/milan_v2_vcek.der``: of google/go-sev-guest, ``verify/testdata/``.
- ``snp/milan_v3_report.bin`` (from its byte 4 on), ``snp/milan_v3_vcek.pem``: of Dstack-TEE/dstack,
  ``dstack/dstack-attest/tests/``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DIRECTORY = Path(os.environ.get("TSQP_EVIDENCE") or Path(__file__).parents[3] / "shared" / "evidence")


def real(name: str) -> bytes:
    """The bytes of one file, by its path in the directory, as ``tdx/quote.bin``; skips the test where it is missing."""
    path = DIRECTORY / name
    if not path.is_file():
        pytest.skip(f"no real evidence {name}: TSQP_EVIDENCE names a directory that has it")
    return path.read_bytes()
