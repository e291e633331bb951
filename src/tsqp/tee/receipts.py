"""Receipts: what a server signs of an answer, and how somebody checks it later. docs/attestation.md, section 6.

Covers: a receipt in which anything was changed is refused, and so is one of another request, answer or server
(tests/tee/test_receipts.py). Does not cover: that the server computed the answer with its weights; that is what a
quote of its software is for, or a replay (tests/server/test_replay.py). Assumes: SHA-256 has no collisions, and nobody
else has the receipt key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tsqp.errors import EvidenceRefused
from tsqp.tee.evidence import SIGNATURE_BYTES, Evidence
from tsqp.tee.statement import Hex32, Name

RECEIPT_VERSION: Final = "tsqp-receipt-v1"
HEADER = "x-tsqp-receipt"
SALT_BYTES = 32
MAX_HEADER_BYTES = 4095
MAX_RECEIPT_BYTES = 16 << 10  # of a file, where a receipt may be written with spaces

Path = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Moment = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799)]  # Unix time, s; to the end of the year 9999
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Checks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``products``: of the worker, checked between the request's arrival and the end of its answer.

    Requests that were computed beside it share products with it, and have some of their own among these; rows kept from
    an earlier request were checked then. A wrong product passes with probability 2 to the minus ``soundness_bits``.
    """

    soundness_bits: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    products: Count


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters as they were used. Those that may hold a user's text, such as stop strings, are in the request alone.

    ``seed``: of the first choice, the client's or one that was drawn; None where nothing was chosen by chance.
    ``max_tokens``: the most of any choice.
    """

    temperature: float
    top_k: Count
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: Seed | None
    max_tokens: Count
    ignore_eos: bool


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many there were: a prompt counts once, the answer's are those of all choices, without end tokens."""

    prompt: Count
    answer: Count


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is signed. Hashes, keys and the identity are 64 hex digits.

    ``model_digest``: of the evidence, with all adapters. ``adapter``: SHA-256 of the one that answered, if one did.
    """

    version: Literal["tsqp-receipt-v1"]
    receipt_key: Hex32
    identity: Hex32
    id: Name
    path: Path
    made_at: Moment
    software: Name
    model_digest: Hex32
    adapter: Hex32 | None
    protection: Name
    kv_dtype: Name
    checks: Checks
    request_sha256: Hex32
    answer_sha256: Hex32
    tokens_sha256: Hex32
    sampling: Sampling
    tokens: Tokens

    def message(self) -> bytes:
        """The bytes that are signed: the tag, then the canonical JSON: keys sorted, no spaces, ASCII."""
        fields = msgspec.to_builtins(self)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return RECEIPT_VERSION.encode() + text.encode()


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The salts, 64 hex digits each. Who passes a receipt on without a text leaves its salt out: null."""

    request: Hex32 | None
    answer: Hex32 | None
    tokens: Hex32 | None

    @classmethod
    def drawn(cls) -> Opening:
        """Three fresh salts."""
        return cls(**{name: secrets.token_hex(SALT_BYTES) for name in cls.__struct_fields__})


class SignedReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A receipt as it travels. The signature is base64 in JSON."""

    receipt: Receipt
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
    opening: Opening

    def to_header(self) -> str:
        """The JSON as base64url without padding, at most 4,095 characters."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).rstrip(b"=").decode()

    def check_signature(self) -> None:
        """By the key that the receipt names. Raises EvidenceRefused."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.receipt.receipt_key))
            key.verify(self.signature, self.receipt.message())
        except (InvalidSignature, ValueError):
            raise EvidenceRefused("signature", "one that is wrong", "one by receipt_key over this receipt") from None

    def check_request(self, body: bytes) -> None:
        """``body``: the bytes that were sent. Raises EvidenceRefused."""
        _same_hash("request", self.opening.request, body, self.receipt.request_sha256)

    def check_answer(self, canonical: bytes) -> None:
        """``canonical``: see ``tsqp.tee.answer_form``. Raises EvidenceRefused."""
        _same_hash("answer", self.opening.answer, canonical, self.receipt.answer_sha256)

    def check_attested(self, evidence: Evidence) -> None:
        """That the receipt's key and all that it says of its server are in evidence, which was verified before.

        Raises EvidenceRefused.
        """
        receipt, configuration = self.receipt, evidence.configuration
        of_evidence = {
            "receipt_key": evidence.receipt_key,
            "model_digest": evidence.model_digest,
            "protection": configuration.protection,
            "software": configuration.software,
            "identity": evidence.statement.identity().hex(),
        }
        for name, expected in of_evidence.items():
            if getattr(receipt, name) != expected:
                raise EvidenceRefused(name.replace("_", "-"), getattr(receipt, name), f"{expected}, as in the evidence")
        if receipt.adapter is not None and receipt.adapter not in configuration.adapters.values():
            raise EvidenceRefused("adapter", receipt.adapter, "one of those in the evidence")
        found, bits = receipt.checks.soundness_bits, configuration.soundness_bits
        if found != bits:
            raise EvidenceRefused("checks.soundness-bits", str(found), f"{bits}, as in the evidence")


_decoder = msgspec.json.Decoder(SignedReceipt, strict=True)


def sign_receipt(receipt: Receipt, opening: Opening, key: Ed25519PrivateKey) -> SignedReceipt:
    """``key``: the secret one of ``receipt.receipt_key``."""
    return SignedReceipt(receipt=receipt, signature=key.sign(receipt.message()), opening=opening)


def salted_sha256(salt: str, data: bytes) -> str:
    """64 hex digits. ``salt``: 64 hex digits, so that every salt has the same length in front of the data."""
    return hashlib.sha256(bytes.fromhex(salt) + data).hexdigest()


def canonical_tokens(choices: Sequence[Sequence[int]]) -> bytes:
    """The one form of the ids of an answer's tokens, by choice."""
    return json.dumps([list(choice) for choice in choices], separators=(",", ":")).encode()


def read_receipt(data: bytes) -> SignedReceipt:
    """From JSON, or from the header with or without its name; the signature is not checked yet.

    Raises EvidenceRefused.
    """
    if len(data) > MAX_RECEIPT_BYTES:
        raise EvidenceRefused("receipt", f"{len(data)} bytes or more", f"at most {MAX_RECEIPT_BYTES}")
    try:
        data = data.strip()
        if not data.startswith(b"{"):
            name, colon, value = data.partition(b":")
            text = value.strip() if colon and name.strip().lower() == HEADER.encode() else data
            data = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return _decoder.decode(data)
    except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError) as error:
        found = f"what cannot be read ({error})"
        raise EvidenceRefused("receipt", found, f"one {RECEIPT_VERSION} object, or the header with one") from None


def _same_hash(name: str, salt: str | None, data: bytes, expected: str) -> None:
    if salt is None:
        raise EvidenceRefused(f"opening.{name}", "null", f"the salt: without it the {name} cannot be compared")
    found = salted_sha256(salt, data)
    if not hmac.compare_digest(found, expected):
        raise EvidenceRefused(name, f"one with the salted hash {found}", f"{expected}, as the receipt says")
