"""Which trusted execution environment this process runs in, as far as the operating system tells.

A hint for a person, not evidence: the host can fake all of it. Only attestation proves a TEE.
"""

from __future__ import annotations

import os
from pathlib import Path

SEV_SNP = "AMD SEV-SNP"
GUEST_DEVICES = {"tdx_guest": "Intel TDX", "tdx-guest": "Intel TDX", "sev-guest": SEV_SNP}


def detect_tee(root: Path = Path("/")) -> str | None:
    """``Intel TDX``, ``AMD SEV-SNP`` or ``Gramine (...)``, and None where nothing of the kind is seen."""
    attestation = root / "dev/attestation/attestation_type"
    if os.path.lexists(attestation):
        return f"Gramine (SGX attestation: {_first_word(attestation) or 'unknown'})"
    for device, name in GUEST_DEVICES.items():
        if (root / "dev" / device).exists():
            return name
    return None


def _first_word(path: Path) -> str:
    """Of a file's text; empty when it cannot be read."""
    try:
        return (path.read_text(errors="replace").split() or [""])[0]
    except OSError:
        return ""
