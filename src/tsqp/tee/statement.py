"""What a server states of itself, and the 64 bytes that a TEE signs of it: docs/attestation.md, section 1.

Covers: two statements that differ in anything have different report data, because each part has a fixed length and the
configuration one canonical form (tests/tee/test_statement.py). Does not cover: that a statement is true; that is what
the measurement of the software in a quote is for. Assumes: SHA-256 and SHA-512 have no collisions.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Final, Literal

import msgspec

EVIDENCE_VERSION: Final = "tsqp-evidence-v1"
HANDSHAKE_VERSION = "tsqp-handshake-v1"
NONCE_BYTES = 32
REPORT_DATA_BYTES = 64

Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]  # 32 bytes
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Keys = Literal["roster"] | Annotated[tuple[Hex32, ...], msgspec.Meta(max_length=64)]
EmbeddingLookup = Literal["plain", "scan", "oram", "auto"]  # auto: scan, and oram once a tree is built


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a server runs, as far as a client may want to refuse it. Without defaults: nothing is taken for granted.

    ``soundness_bits``: a wrong product passes with probability 2 to the minus this; 0 where nothing is checked.
    ``worker_keys``, ``dealer_keys``: public CURVE keys, 64 hex digits each, sorted; empty for a worker on this machine;
    ``roster`` for those whom a roster names, now or later. Of dealers whom a front with a key names: the front's key.
    ``oblivious``: whether the memory that embedding and sampler touch tells of no token. ``embedding``: how a row of
    the table is found; ``plain`` where that does tell.
    ``adapters``: SHA-256 of each LoRA adapter that a request may name, by name.
    """

    software: Name
    protection: Name
    partition: Name
    soundness_bits: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    worker_keys: Keys
    dealer_keys: Keys
    adapters: Annotated[dict[Name, Hex32], msgspec.Meta(max_length=64)]
    oblivious: bool
    embedding: EmbeddingLookup
    locked_memory: bool

    def canonical(self) -> bytes:
        """The one JSON form that is hashed: keys sorted, no spaces, ASCII."""
        return json.dumps(msgspec.to_builtins(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a quote binds. Hashes and keys are 64 hex digits; ``receipt_key`` is a public Ed25519 key."""

    nonce: Hex32
    spki_sha256: Hex32
    receipt_key: Hex32
    model_digest: Hex32
    configuration: Configuration

    def report_data(self) -> bytes:
        """The 64 bytes that a TEE signs."""
        parts = (EVIDENCE_VERSION.encode(), bytes.fromhex(self.nonce), self._same_for_each_nonce())
        return hashlib.sha512(b"".join(parts)).digest()

    def identity(self) -> bytes:
        """32 bytes that name the server to a receipt: SHA-256 of all but the nonce."""
        return hashlib.sha256(self._same_for_each_nonce()).digest()

    def _same_for_each_nonce(self) -> bytes:
        parts = (self.spki_sha256, self.receipt_key, self.model_digest)
        return b"".join(map(bytes.fromhex, parts)) + hashlib.sha256(self.configuration.canonical()).digest()


def handshake_message(nonce: bytes, certificate: bytes, made_at: int) -> bytes:
    """What the receipt key signs for one question. ``certificate``: SHA-256 of the leaf, DER; ``made_at``: Unix time.

    Raises ValueError for parts of another length.
    """
    if len(nonce) != NONCE_BYTES or len(certificate) != hashlib.sha256().digest_size:
        raise ValueError("a nonce and a hash of a certificate have 32 bytes each")
    return HANDSHAKE_VERSION.encode() + nonce + certificate + made_at.to_bytes(8, "big")
