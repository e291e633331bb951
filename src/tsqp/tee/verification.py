"""Evidence against a policy: every check in one order, and the first that fails is the refusal.

docs/attestation.md, section 4. Covers: nothing of evidence is believed before the quote is, and nothing is skipped
(tests/tee/test_verification.py). Does not cover: what a TEE does not protect from (section 7). Assumes: the policy is
right, and so is this machine's clock.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tsqp.errors import EvidenceRefused
from tsqp.tee.collateral import Collateral
from tsqp.tee.evidence import Evidence
from tsqp.tee.policy import Policy, check_server, one_of
from tsqp.tee.quotes.amd_certificates import MALFORMED, certificates_in
from tsqp.tee.quotes.intel import check_sgx, check_tdx
from tsqp.tee.quotes.snp import AMD_ROOTS, check_snp

CLOCKS_S = 300  # by which the clocks of both machines may differ


@dataclass(frozen=True)
class Roots:
    """Whose keys are believed. ``intel``: DER of a root in place of Intel's; tests have their own."""

    intel: bytes | None = None
    amd: Mapping[str, str] = field(default_factory=lambda: AMD_ROOTS)


MAKERS = Roots()


def verify_connection(
    evidence: Evidence,
    policy: Policy,
    collateral: Collateral,
    *,
    nonce: bytes,
    certificate: bytes,
    now: float,
    roots: Roots = MAKERS,
) -> None:
    """Evidence that came over a connection: ``nonce`` was sent, ``certificate`` is its leaf, DER.

    Raises EvidenceRefused. Once this returns, the key of that certificate belongs to what the policy describes.
    """
    _same("nonce", evidence.nonce, nonce.hex(), "the one that was sent")
    leaf = hashlib.sha256(certificate).hexdigest()
    _same("certificate-sha256", evidence.certificate_sha256, leaf, "that of this connection's certificate")
    spki = spki_sha256(certificate).hex()
    _same("spki-sha256", evidence.spki_sha256, spki, "that of this connection's key")
    _verify(evidence, policy, collateral, now, roots)


def verify_file(
    evidence: Evidence, policy: Policy, collateral: Collateral, *, now: float, roots: Roots = MAKERS
) -> None:
    """Evidence that somebody has kept: it is of the server that had its keys then. Raises EvidenceRefused."""
    _verify(evidence, policy, collateral, now, roots)


def spki_sha256(certificate: bytes) -> bytes:
    """32 bytes: SHA-256 of the public key of a certificate in DER. Raises EvidenceRefused for what is none."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except MALFORMED:
        raise EvidenceRefused("certificate", "what cannot be read", "an X.509 certificate") from None
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def _verify(evidence: Evidence, policy: Policy, collateral: Collateral, now: float, roots: Roots) -> None:
    evidence.check_signature()
    age = now - evidence.made_at
    if not -CLOCKS_S <= age <= policy.max_age_s + CLOCKS_S:
        raise EvidenceRefused("made-at", f"{age:.0f} s ago", f"at most {policy.max_age_s} s ago")
    one_of("kind", evidence.kind, policy.kinds)
    if evidence.kind == "none":
        if evidence.quote or evidence.certificates:
            raise EvidenceRefused("quote", f"{len(evidence.quote)} bytes", "none, as the kind says")
    else:
        bound = _quoted(evidence, policy, collateral, now, roots)
        if not hmac.compare_digest(bound, evidence.statement.report_data()):
            raise EvidenceRefused("report-data", bound.hex(), "the hash of this statement")
    check_server(policy.server, evidence.model_digest, evidence.configuration)


def _quoted(evidence: Evidence, policy: Policy, collateral: Collateral, now: float, roots: Roots) -> bytes:
    """The report data that a quote of the policy's kind binds."""
    if evidence.kind == "sev-snp" and policy.sev_snp is not None:
        found = certificates_in(evidence.certificates)
        found += collateral.amd(evidence.quote, policy.sev_snp.products)
        return check_snp(evidence.quote, found, policy.sev_snp, now, roots.amd)
    if evidence.certificates:
        raise EvidenceRefused("certificates", f"{len(evidence.certificates)} bytes", f"none beside {evidence.kind}")
    given = collateral.intel(evidence.kind, evidence.quote)
    if evidence.kind == "tdx" and policy.tdx is not None:
        return check_tdx(evidence.quote, given, policy.tdx, now, roots.intel)
    if evidence.kind == "sgx" and policy.sgx is not None:
        return check_sgx(evidence.quote, given, policy.sgx, now, roots.intel)
    raise EvidenceRefused("kind", evidence.kind, "one with a section of its own in the policy")


def _same(name: str, found: str, expected: str, in_words: str) -> None:
    if not hmac.compare_digest(found, expected):
        raise EvidenceRefused(name, found, in_words)
