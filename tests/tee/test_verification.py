"""Evidence of kind none, which has no quote: all that is checked beside quotes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.tee.certificates import KeyPair, key_pair
from tests.tee.policies import policy
from tests.tee.statements import CONFIGURATION, RECEIPT_KEY, statement
from tsqp.errors import EvidenceRefused
from tsqp.tee.collateral import Without
from tsqp.tee.evidence import Evidence, Quote, make_evidence
from tsqp.tee.verification import CLOCKS_S, spki_sha256, verify_connection, verify_file

NOW = 1_800_000_000
NONCE = b"\xaa" * 32
PAIR = key_pair()
NONE = policy(["none"])


def evidence(pair: KeyPair = PAIR, quote: Quote | None = None, made_at: int = NOW, **changes: Any) -> Evidence:
    given = statement(**{"spki_sha256": spki_sha256(pair.der).hex(), **changes})
    return make_evidence(given, quote or Quote(kind="none", quote=b""), RECEIPT_KEY, pair.der, made_at)


def verify(found: Evidence, **changes: Any) -> None:
    given = {"nonce": NONCE, "certificate": PAIR.der, "now": NOW, **changes}
    verify_connection(found, given.pop("policy", NONE), Without(), **given)


def test_what_the_policy_names_is_accepted() -> None:
    verify(evidence())
    verify_file(evidence(), NONE, Without(), now=NOW)


def test_a_replayed_nonce_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match=r"nonce is aaaa.*the one that was sent"):
        verify(evidence(), nonce=b"\xab" * 32)


def test_evidence_of_another_server_is_refused() -> None:
    """Relayed: right in all, but for a connection whose key is somebody else's."""
    with pytest.raises(EvidenceRefused, match=r"certificate-sha256 is .*of this connection's certificate"):
        verify(evidence(), certificate=key_pair().der)


def test_another_certificate_of_the_same_key_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match="certificate-sha256 is "):
        verify(evidence(), certificate=key_pair(PAIR.key).der)


def test_a_statement_about_another_key_is_refused() -> None:
    """The handshake is signed for this certificate, and the quote speaks of another key."""
    with pytest.raises(EvidenceRefused, match=r"spki-sha256 is bbbb.*of this connection's key"):
        verify(evidence(spki_sha256="bb" * 32))


def test_a_handshake_that_the_attested_key_did_not_sign_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match="signature is "):
        verify(evidence(receipt_key="ab" * 32))


@pytest.mark.parametrize(
    ("seconds", "accepted"),
    [(3600 + CLOCKS_S, True), (3601 + CLOCKS_S, False), (-CLOCKS_S, True), (-CLOCKS_S - 1, False)],
)
def test_evidence_has_an_age(seconds: int, accepted: bool) -> None:
    found = evidence(made_at=NOW - seconds)
    if accepted:
        verify_file(found, NONE, Without(), now=NOW)
    else:
        with pytest.raises(EvidenceRefused, match=r"made-at is -?\d+ s ago, and not at most 3600 s ago"):
            verify_file(found, NONE, Without(), now=NOW)


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp"])
def test_no_policy_accepts_a_kind_that_it_does_not_name(kind: Any) -> None:
    with pytest.raises(EvidenceRefused, match=rf"kind is none, and not one of the policy's: {kind}"):
        verify(evidence(), policy=policy([kind]))
    with pytest.raises(EvidenceRefused, match=rf"kind is {kind}, and not one of the policy's: none"):
        verify(evidence(quote=Quote(kind=kind, quote=b"x")))


def test_kind_none_has_no_quote() -> None:
    with pytest.raises(EvidenceRefused, match="quote is 1 bytes, and not none"):
        verify(evidence(quote=Quote(kind="none", quote=b"x")))
    with pytest.raises(EvidenceRefused, match="quote is 0 bytes, and not none"):
        verify(evidence(quote=Quote(kind="none", quote=b"", certificates=b"x")))


def test_a_downgraded_server_is_refused() -> None:
    weaker = msgspec.structs.replace(CONFIGURATION, protection="open", soundness_bits=0)
    with pytest.raises(EvidenceRefused, match=r"server\.protection is open"):
        verify(evidence(configuration=weaker))
    with pytest.raises(EvidenceRefused, match=r"server\.model-digest is dddd"):
        verify(evidence(model_digest="dd" * 32))


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match="certificate is what cannot be read"):
        spki_sha256(b"no certificate")


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("a003020102", "a003020101"),  # a version 2, which TLS lets pass
        ("2a8648ce3d0201", "2a8648ce3d0209"),  # a key of an unknown kind
    ],
)
def test_a_certificate_that_is_not_understood_is_refused(there: str, instead: str) -> None:
    strange = PAIR.der.replace(bytes.fromhex(there), bytes.fromhex(instead), 1)
    assert strange != PAIR.der
    with pytest.raises(EvidenceRefused, match="certificate is what cannot be read"):
        spki_sha256(strange)
