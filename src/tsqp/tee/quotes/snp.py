"""Reports of AMD SEV-SNP: signed by a chip's key, whose certificate AMD's root vouches for.

Covers: chain to AMD's root of the product line, the report's signature, that the certificate is of this chip and this
TCB version, revocation where the policy asks for it, debug, migration, measurements (tests/tee/quotes/test_snp.py).
Does not cover: keys of clouds (VLEK), which are refused by name. Assumes: AMD's keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import pairwise

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tsqp.errors import EvidenceRefused
from tsqp.tee.policy import SnpPolicy, at_least, one_of
from tsqp.tee.quotes.amd_certificates import AMD_OID, MAX_CERTIFICATES, Certificate, Found, Revocations
from tsqp.tee.quotes.snp_report import POLICY_DEBUG, POLICY_MIGRATION, VCEK, MalformedReport, SnpReport, Tcb

# SHA-256 of the SPKI of AMD's root key (ARK) of each product line: https://kdsintf.amd.com/vcek/v1/<line>/cert_chain
AMD_ROOTS = {
    "Milan": "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9",
    "Genoa": "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831",
}
# What a VCEK certificate says of its chip: AMD, "Versioned Chip Endorsement Key Certificate and KDS Interface", 57230.
PRODUCT, HWID = f"{AMD_OID}.2", f"{AMD_OID}.4"
TCB_OIDS = {"bootloader": ".3.1", "tee": ".3.2", "snp": ".3.3", "microcode": ".3.8", "fmc": ".3.9"}
DER_INTEGER, DER_OCTETS, DER_TEXT = 0x02, 0x04, 0x16


def check_snp(quote: bytes, found: Found, policy: SnpPolicy, now: float, roots: Mapping[str, str] = AMD_ROOTS) -> bytes:
    """The 64 bytes of report data of a report that a policy accepts.

    ``now``: Unix time, s. ``roots``: SHA-256 of the SPKI of each line's root. Raises EvidenceRefused.
    """
    try:
        report = SnpReport.parse(quote)
    except MalformedReport as error:
        raise EvidenceRefused(f"sev-snp.{error.field}", error.found, error.expected) from None
    if report.signing_key != VCEK:
        raise EvidenceRefused("sev-snp.signing-key", str(report.signing_key), "0, the key of the chip (VCEK)")
    if report.policy & POLICY_DEBUG:
        raise EvidenceRefused("sev-snp.guest-policy", f"{report.policy:#x}, which allows debug", "one without debug")
    if report.policy & POLICY_MIGRATION:
        raise EvidenceRefused("sev-snp.guest-policy", f"{report.policy:#x}, which allows migration", "one without")
    chain = _chain(found.certificates, roots)
    _check_chain(chain, found.revocations, policy, now)
    leaf = chain[0]
    _check_chip(leaf, report, policy)
    key = leaf.key
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceRefused("sev-snp.chain", "a key of another kind", "P-384 in the chip's certificate")
    try:
        key.verify(encode_dss_signature(report.r, report.s), report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise EvidenceRefused("sev-snp.signature", "one that is wrong", "one by the chip's key") from None
    _check_guest(report, policy)
    return report.report_data


def _chain(certificates: Iterable[Certificate], roots: Mapping[str, str]) -> list[Certificate]:
    """Chip, signer of the line, root. Raises EvidenceRefused for one that is not there."""
    # The same ones may come with the report and as collateral.
    given = list({(one.signed, one.signature): one for one in certificates}.values())[:MAX_CERTIFICATES]
    leaves = [one for one in given if HWID in one.amd]
    if len(leaves) != 1:
        raise EvidenceRefused("sev-snp.certificates", f"{len(leaves)} of chips (VCEK)", "one: give it as collateral")
    chain = leaves
    for name in ("signer (ASK)", "root (ARK)"):
        above = [one for one in given if one.subject == chain[-1].issuer and one not in chain]
        if not above:
            raise EvidenceRefused("sev-snp.certificates", f"without the {name}", "with it: give it as collateral")
        chain.append(above[0])
    if roots.get(_product(chain[0])) != hashlib.sha256(chain[-1].spki).hexdigest():
        raise EvidenceRefused("sev-snp.chain", "one to another root", f"one to AMD's of its line: {', '.join(roots)}")
    return chain


def _check_chain(
    chain: list[Certificate],
    revocations: Iterable[Revocations],
    policy: SnpPolicy,
    now: float,
) -> None:
    moment = datetime.fromtimestamp(now, UTC)
    for below, above in pairwise([*chain, chain[-1]]):  # the root vouches for itself
        if not below.begins <= moment <= below.ends:
            raise EvidenceRefused("sev-snp.chain", f"a certificate not valid at {moment:%F %T} UTC", "a valid one")
        _check_signed(below.signature, below.signed, above.key, "certificate")
    if policy.revocation == "any":
        return
    current = [one for one in revocations if one.issuer == chain[-1].subject]
    if not current:
        raise EvidenceRefused("sev-snp.revocation", "unknown", "a revocation list of AMD's root: give it as collateral")
    for one in current:
        _check_signed(one.signature, one.signed, chain[-1].key, "revocation list")
        if one.ends is None or not one.begins <= moment <= one.ends:
            raise EvidenceRefused("sev-snp.revocation", f"a list not valid at {moment:%F %T} UTC", "a current one")
        if any(each.serial in one.serials for each in chain[1:]):
            raise EvidenceRefused("sev-snp.revocation", "a certificate that was revoked", "one that was not")


def _check_signed(signature: bytes, data: bytes, key: object, what: str) -> None:
    """As AMD signs: RSASSA-PSS with SHA-384."""
    scheme = padding.PSS(padding.MGF1(hashes.SHA384()), padding.PSS.DIGEST_LENGTH)
    try:
        if not isinstance(key, rsa.RSAPublicKey):
            raise InvalidSignature
        key.verify(signature, data, scheme, hashes.SHA384())
    except InvalidSignature:
        raise EvidenceRefused("sev-snp.chain", f"a {what} with a wrong signature", "one that AMD has signed") from None


def _check_chip(leaf: Certificate, report: SnpReport, policy: SnpPolicy) -> None:
    """A key of one chip at one TCB version signs for these only."""
    one_of("sev-snp.products", _product(leaf), policy.products)
    chip = bytes.fromhex(report.chip_id)
    if report.masked_chip_key or _value(leaf, HWID, DER_OCTETS).ljust(len(chip), b"\0") != chip:  # Turin has 8 bytes
        raise EvidenceRefused("sev-snp.chip-id", report.chip_id, "that of the chip's certificate")
    names = [name for name in TCB_OIDS if name != "fmc" or report.reported_tcb.fmc is not None]
    certified = Tcb(**{name: _part(leaf, TCB_OIDS[name]) for name in names})
    if certified != report.reported_tcb:
        raise EvidenceRefused("sev-snp.reported-tcb", str(report.reported_tcb), f"{certified} of the certificate")


def _check_guest(report: SnpReport, policy: SnpPolicy) -> None:
    one_of("sev-snp.guest-policy", report.policy.to_bytes(8, "big").hex(), policy.guest_policy)
    one_of("sev-snp.platform-info", report.platform_info.to_bytes(8, "big").hex(), policy.platform_info)
    one_of("sev-snp.vmpl", report.vmpl, policy.vmpl)
    at_least("sev-snp.guest-svn", report.guest_svn, policy.min_guest_svn)
    for name in ("measurement", "host_data", "id_key_digest", "author_key_digest", "family_id", "image_id", "chip_id"):
        one_of(f"sev-snp.{name.replace('_', '-')}", getattr(report, name), getattr(policy, name))
    for which in ("reported_tcb", "committed_tcb", "current_tcb", "launch_tcb"):
        for part in ("bootloader", "tee", "snp", "microcode"):
            field = f"sev-snp.{which.replace('_', '-')}.{part}"
            at_least(field, getattr(getattr(report, which), part), getattr(policy.min_tcb, part))


def _product(leaf: Certificate) -> str:
    """Milan of ``Milan-B0``."""
    return _value(leaf, PRODUCT, DER_TEXT).decode("ascii", "replace").split("-")[0]


def _value(certificate: Certificate, oid: str, tag: int) -> bytes:
    """The content of a DER value of under 128 bytes; raw where AMD writes no DER. Raises EvidenceRefused."""
    raw = certificate.amd.get(oid)
    if raw is None:
        raise EvidenceRefused("sev-snp.chain", f"a chip's certificate without {oid}", "one as AMD makes them")
    return raw[2:] if raw[:1] == bytes((tag,)) and raw[1:2] == bytes((len(raw) - 2,)) else raw


def _part(certificate: Certificate, oid: str) -> int:
    raw = _value(certificate, AMD_OID + oid, DER_INTEGER)
    return int.from_bytes(raw, "big")
