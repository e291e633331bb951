"""What Intel publishes of its platforms: TCB info (v3) and the identity of quoting enclaves (v2), not signed yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.tee.forge.certificates import Validity, moment

Tee = Literal["tdx", "sgx"]

COMPONENTS = 16  # security versions in a TCB level, of each kind
TCB_EVALUATION = 17


@dataclass(frozen=True)
class Level:
    """A TCB level: what a platform has at least, and what its status then is.

    ``cpu_svn``, ``tdx_svn``: 16 bytes, a security version each.
    """

    cpu_svn: bytes
    tdx_svn: bytes
    pce_svn: int
    status: str
    advisories: Sequence[str] = ()

    def to_json(self, tee: Tee) -> dict[str, Any]:
        """As TCB info has it."""
        tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in self.cpu_svn], "pcesvn": self.pce_svn}
        if tee == "tdx":
            tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in self.tdx_svn]
        return {"tcb": tcb, **_verdict(self.status, self.advisories)}


def tcb_info(
    tee: Tee, fmspc: bytes, pce_id: bytes, levels: Sequence[Level], module_status: str, valid: Validity
) -> str:
    """The text that is signed. ``module_status``: of the TDX module, whatever its version."""
    info: dict[str, Any] = {
        "id": tee.upper(),
        "version": 3,
        **_dates(valid),
        "fmspc": fmspc.hex().upper(),
        "pceId": pce_id.hex().upper(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": TCB_EVALUATION,
    }
    if tee == "tdx":
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        versions = [{"tcb": {"isvsvn": 0}, **_verdict(module_status)}]
        info["tdxModule"] = module
        info["tdxModuleIdentities"] = [{"id": "TDX_01", **module, "tcbLevels": versions}]
    info["tcbLevels"] = [level.to_json(tee) for level in levels]
    return json.dumps(info, separators=(",", ":"))


def qe_identity(tee: Tee, mr_signer: bytes, product: int, isv_svn: int, status: str, valid: Validity) -> str:
    """The text that is signed: which quoting enclave may sign for this TEE."""
    identity = {
        "id": "TD_QE" if tee == "tdx" else "QE",
        "version": 2,
        **_dates(valid),
        "tcbEvaluationDataNumber": TCB_EVALUATION,
        "miscselect": "00" * 4,
        "miscselectMask": "FF" * 4,
        "attributes": "11" + "00" * 15,
        "attributesMask": "FB" + "FF" * 7 + "00" * 8,
        "mrsigner": mr_signer.hex().upper(),
        "isvprodid": product,
        "tcbLevels": [{"tcb": {"isvsvn": isv_svn}, **_verdict(status)}],
    }
    return json.dumps(identity, separators=(",", ":"))


def _dates(valid: Validity) -> dict[str, str]:
    issued, update = (f"{moment(seconds):%Y-%m-%dT%H:%M:%SZ}" for seconds in valid)
    return {"issueDate": issued, "nextUpdate": update}


def _verdict(status: str, advisories: Sequence[str] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {"tcbDate": "2025-03-12T00:00:00Z", "tcbStatus": status}
    return {**found, "advisoryIDs": list(advisories)} if advisories else found
