"""Evidence as it crosses the network: one JSON object, read strictly. docs/attestation.md, section 2.

Covers: what is read has known fields only, of known sizes, and its signature by the receipt key is right
(tests/tee/test_evidence.py). Does not cover: the quote in it, whose report data names that key
(docs/attestation.md, section 4).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tsqp.errors import EvidenceRefused
from tsqp.tee.statement import EVIDENCE_VERSION, Configuration, Hex32, Statement, handshake_message

Kind = Literal["tdx", "sev-snp", "sgx", "none"]

MAX_EVIDENCE_BYTES = 64 << 10
MAX_QUOTE_BYTES = 20 << 10
SIGNATURE_BYTES = 64

Time = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider gives. ``certificates``: what came beside the quote, empty for most kinds."""

    kind: Kind
    quote: bytes
    certificates: bytes = b""


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See docs/attestation.md, section 2. Bytes are base64 in JSON."""

    version: Literal["tsqp-evidence-v1"]
    kind: Kind
    quote: Annotated[bytes, msgspec.Meta(max_length=MAX_QUOTE_BYTES)]
    certificates: Annotated[bytes, msgspec.Meta(max_length=MAX_QUOTE_BYTES)]
    nonce: Hex32
    spki_sha256: Hex32
    receipt_key: Hex32
    model_digest: Hex32
    configuration: Configuration
    certificate_sha256: Hex32
    made_at: Time
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]

    @property
    def statement(self) -> Statement:
        """What the quote binds."""
        return Statement(
            nonce=self.nonce,
            spki_sha256=self.spki_sha256,
            receipt_key=self.receipt_key,
            model_digest=self.model_digest,
            configuration=self.configuration,
        )

    def to_json(self) -> bytes:
        """As it is sent."""
        return msgspec.json.encode(self)

    def check_signature(self) -> None:
        """Of the handshake, by the key that the statement names. Raises EvidenceRefused."""
        message = handshake_message(bytes.fromhex(self.nonce), bytes.fromhex(self.certificate_sha256), self.made_at)
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.receipt_key)).verify(self.signature, message)
        except (InvalidSignature, ValueError):
            raise EvidenceRefused("signature", "one that is wrong", "one by receipt_key over the handshake") from None


_decoder = msgspec.json.Decoder(Evidence, strict=True)


def make_evidence(
    statement: Statement, quote: Quote, key: Ed25519PrivateKey, certificate: bytes, made_at: int
) -> Evidence:
    """Evidence for one question. ``certificate``: the leaf of the connection's TLS, DER; ``made_at``: Unix time, s."""
    leaf = hashlib.sha256(certificate).digest()
    return Evidence(
        version=EVIDENCE_VERSION,
        kind=quote.kind,
        quote=quote.quote,
        certificates=quote.certificates,
        nonce=statement.nonce,
        spki_sha256=statement.spki_sha256,
        receipt_key=statement.receipt_key,
        model_digest=statement.model_digest,
        configuration=statement.configuration,
        certificate_sha256=leaf.hex(),
        made_at=made_at,
        signature=key.sign(handshake_message(bytes.fromhex(statement.nonce), leaf, made_at)),
    )


def read_evidence(data: bytes) -> Evidence:
    """Read what a server sent or a file holds; the signature is not checked yet. Raises EvidenceRefused."""
    if len(data) > MAX_EVIDENCE_BYTES:
        raise EvidenceRefused("evidence", f"{len(data)} bytes", f"at most {MAX_EVIDENCE_BYTES}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        found = f"what cannot be read ({error})"
        raise EvidenceRefused("evidence", found, f"one {EVIDENCE_VERSION} object") from None
