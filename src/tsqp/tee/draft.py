"""A policy that accepts what one piece of evidence says, to be read and corrected by a person.

It is written from what a server says of itself, before anything of it was verified: a start, and no proof.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from tsqp.errors import EvidenceRefused
from tsqp.tee.evidence import Evidence
from tsqp.tee.policy import MAX_POLICY_BYTES, ServerPolicy, SgxPolicy, SnpPolicy, SnpTcb, TdxPolicy, parse_policy
from tsqp.tee.quotes.intel import TDX_FIELDS, qvl
from tsqp.tee.quotes.snp_report import MalformedReport, SnpReport
from tsqp.tee.statement import Keys

HEAD = """\
# What the server said of itself, and nobody has verified. Compare each value with that of the software that you mean to
# trust; "any" is not checked. docs/attestation.md says what each field is.
"""
PER_START = {"rtmr3", "mrconfigid", "mrowner", "mrownerconfig"}  # zero, or of the start of one guest


def draft_policy(evidence: Evidence) -> str:
    """TOML. Raises EvidenceRefused for a quote that cannot be read."""
    configuration = evidence.configuration
    server = ServerPolicy(
        model_digests=(evidence.model_digest,),
        protections=(configuration.protection,),
        partitions=(configuration.partition,),
        software=(configuration.software,),
        min_soundness_bits=configuration.soundness_bits,
        worker_keys=_keys(configuration.worker_keys),
        dealer_keys=_keys(configuration.dealer_keys),
        adapters=tuple(configuration.adapters.values()) or "any",
        oblivious="any",
        embeddings="any",
        locked_memory="any",
    )
    sections: dict[str, Any] = {"server": server}
    if evidence.kind != "none":
        sections[evidence.kind] = {"tdx": _tdx, "sgx": _sgx, "sev-snp": _snp}[evidence.kind](evidence)
    lines = [HEAD, "version = 1", f'kinds = ["{evidence.kind}"]', "max-age-s = 3600"]
    for name, section in sections.items():
        fields = msgspec.to_builtins(section)
        lines += ["", f"[{name}]", *(f"{field} = {_toml(value)}" for field, value in fields.items())]
    text = "\n".join(lines) + "\n"
    parse_policy(text.encode()[:MAX_POLICY_BYTES])  # what is printed is a policy
    return text


def _keys(found: Keys) -> Literal["any"] | tuple[str, ...]:
    """What accepts them: a roster may name other keys at any time."""
    return "any" if found == "roster" else found or "any"


def _tdx(evidence: Evidence) -> TdxPolicy:
    quote = _parsed("tdx", evidence.quote)
    found = {name: getattr(quote.report, field).hex() for name, field in TDX_FIELDS.items()}
    fields: dict[str, Any] = {name: "any" if name in PER_START else (value,) for name, value in found.items()}
    return TdxPolicy(
        **fields,
        min_tee_tcb_svn=quote.report.tee_tcb_svn.hex(),
        tcb_status=("UpToDate",),
        advisories=(),
        fmspc="any",
    )


def _sgx(evidence: Evidence) -> SgxPolicy:
    report = _parsed("sgx", evidence.quote).report
    return SgxPolicy(
        mrenclave=(report.mr_enclave.hex(),),
        mrsigner=(report.mr_signer.hex(),),
        isv_prod_id="any",
        min_isv_svn=0,
        attributes=(report.attributes.hex(),),
        tcb_status=("UpToDate",),
        advisories=(),
        fmspc="any",
    )


def _snp(evidence: Evidence) -> SnpPolicy:
    try:
        report = SnpReport.parse(evidence.quote)
    except MalformedReport as error:
        raise EvidenceRefused(f"sev-snp.{error.field}", error.found, error.expected) from None
    tcb = report.reported_tcb
    return SnpPolicy(
        measurement=(report.measurement,),
        host_data="any",
        id_key_digest=(report.id_key_digest,),
        author_key_digest="any",
        family_id="any",
        image_id="any",
        chip_id="any",
        products=("Milan", "Genoa"),
        guest_policy=(report.policy.to_bytes(8, "big").hex(),),
        platform_info="any",
        vmpl=(report.vmpl,),
        min_guest_svn=report.guest_svn,
        min_tcb=SnpTcb(bootloader=tcb.bootloader, tee=tcb.tee, snp=tcb.snp, microcode=tcb.microcode),
        revocation="any",
    )


def _parsed(kind: str, quote: bytes) -> Any:
    """A quote of this kind, which may be another's. Raises EvidenceRefused, OptionError."""
    try:
        found = qvl().parse_quote(quote)
    except ValueError as error:
        raise EvidenceRefused(f"{kind}.quote", f"not valid ({error})", "a quote") from None
    if found.is_tdx() != (kind == "tdx"):
        raise EvidenceRefused(f"{kind}.quote", f"one of {found.quote_type()}", f"one of {kind}")
    return found


def _toml(value: Any) -> str:
    """Strings, numbers, lists of them and one level of tables: JSON's forms but for the table."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    return json.dumps(value)
