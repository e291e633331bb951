"""Quotes of Intel TDX and SGX, checked by dcap-qvl against Intel's root.

Covers: signature, PCK chain, revocation, TCB status, age of the collateral, debug, service TDs (dcap-qvl);
attributes and measurements (here; tests/tee/quotes/test_intel.py). Does not cover: bytes after the signed part, and the
copy of Intel's root in a quote, which nobody uses. Assumes: the collateral is at hand and its clock is right.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tsqp.errors import EvidenceRefused, OptionError
from tsqp.tee.policy import SgxPolicy, TdxPolicy, at_least, one_of

QVL = "dcap-qvl>=0.7"  # the extra `verify` of pyproject.toml: clients verify, and no server or worker needs it
TDX_REPORTS = ("TD10", "TD15")

TDX_FIELDS = {  # of a policy, and as dcap-qvl names them
    "mrtd": "mr_td",
    "rtmr0": "rt_mr0",
    "rtmr1": "rt_mr1",
    "rtmr2": "rt_mr2",
    "rtmr3": "rt_mr3",
    "mrconfigid": "mr_config_id",
    "mrowner": "mr_owner",
    "mrownerconfig": "mr_owner_config",
    "mrseam": "mr_seam",
    "mrsignerseam": "mr_signer_seam",
    "attributes": "td_attributes",
    "xfam": "xfam",
}


def check_tdx(quote: bytes, collateral: str, policy: TdxPolicy, now: float, root: bytes | None = None) -> bytes:
    """The 64 bytes of report data of a TD's quote that a policy accepts.

    ``collateral``: JSON as dcap-qvl has it. ``now``: Unix time, s. ``root``: another root than Intel's, DER, for tests.
    Raises EvidenceRefused, OptionError without dcap-qvl.
    """
    found = _verified("tdx", quote, collateral, now, root)
    _check_platform("tdx", found, policy)
    report = _report("tdx", found, TDX_REPORTS)
    report = report.get("base", report)  # of version 1.5, with fields of 1.0 in it
    for field, reported in TDX_FIELDS.items():
        one_of(f"tdx.{field}", report[reported], getattr(policy, field))
    if policy.min_tee_tcb_svn != "any":
        least = bytes.fromhex(policy.min_tee_tcb_svn)
        for at, (part, bound) in enumerate(zip(bytes.fromhex(report["tee_tcb_svn"]), least, strict=True)):
            at_least(f"tdx.tee-tcb-svn[{at}]", part, bound)
    return bytes.fromhex(report["report_data"])


def check_sgx(quote: bytes, collateral: str, policy: SgxPolicy, now: float, root: bytes | None = None) -> bytes:
    """The same of an enclave's quote."""
    found = _verified("sgx", quote, collateral, now, root)
    _check_platform("sgx", found, policy)
    report = _report("sgx", found, ("SgxEnclave",))
    one_of("sgx.mrenclave", report["mr_enclave"], policy.mrenclave)
    one_of("sgx.mrsigner", report["mr_signer"], policy.mrsigner)
    one_of("sgx.isv-prod-id", report["isv_prod_id"], policy.isv_prod_id)
    at_least("sgx.isv-svn", report["isv_svn"], policy.min_isv_svn)
    one_of("sgx.attributes", report["attributes"], policy.attributes)
    return bytes.fromhex(report["report_data"])


def _verified(kind: str, quote: bytes, collateral: str, now: float, root: bytes | None) -> dict[str, Any]:
    """What dcap-qvl has verified, with the FMSPC of the PCK certificate beside it."""
    library = qvl()
    try:
        found = library.QuoteCollateralV3.from_json(collateral)
    except ValueError as error:
        raise EvidenceRefused(f"{kind}.collateral", f"unreadable ({error})", "collateral as dcap-qvl has it") from None
    try:
        if root is None:
            verified = library.verify(quote, found, int(now))
        else:
            verified = library.verify_with_root_ca(quote, found, root, int(now))
        fmspc = library.parse_quote(quote).fmspc()
    except ValueError as error:
        raise EvidenceRefused(f"{kind}.quote", f"not valid ({error})", "a quote that Intel's keys vouch for") from None
    return {**json.loads(verified.to_json()), "fmspc": fmspc}


def _check_platform(kind: str, found: dict[str, Any], policy: TdxPolicy | SgxPolicy) -> None:
    one_of(f"{kind}.tcb-status", found["status"], policy.tcb_status)
    for advisory in found["advisory_ids"]:
        one_of(f"{kind}.advisories", advisory, policy.advisories)
    one_of(f"{kind}.fmspc", found["fmspc"], policy.fmspc)


def _report(kind: str, found: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """The one report of a quote. A TD's quote in evidence of kind sgx is not taken, nor the other way round."""
    ((name, report),) = found["report"].items()
    if name not in known:
        raise EvidenceRefused(f"{kind}.quote", f"of the kind {name}", f"one of {', '.join(known)}")
    fields: dict[str, Any] = report
    return fields


def platform_of(kind: str, quote: bytes) -> str:
    """What collateral depends on: kind and FMSPC, as in ``tdx B0C06F000000``. Raises EvidenceRefused, OptionError."""
    try:
        return f"{kind} {qvl().parse_quote(quote).fmspc()}"
    except ValueError as error:
        raise EvidenceRefused(f"{kind}.quote", f"not valid ({error})", "a quote") from None


def qvl() -> Any:
    """The library. Raises OptionError where it is not installed."""
    try:
        import dcap_qvl
    except ImportError:
        command = f"{sys.executable} -m pip install '{QVL}'"
        raise OptionError(f"a quote of Intel is checked by a package that is not installed here: {command}") from None
    return dcap_qvl
