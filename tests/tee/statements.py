"""Statements, evidence and keys for tests."""

from __future__ import annotations

from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tsqp.tee.statement import Configuration, Statement

RECEIPT_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CERTIFICATE = b"a leaf certificate, DER"
CONFIGURATION = Configuration(
    software="tsqp 0.1.0",
    protection="masked",
    partition="linear",
    soundness_bits=62,
    worker_keys=("11" * 32,),
    dealer_keys=(),
    adapters={"legal": "22" * 32},
    oblivious=False,
    embedding="plain",
    locked_memory=False,
)


def statement(**changes: Any) -> Statement:
    """One that is right, but for ``changes``."""
    plain = Statement(
        nonce="aa" * 32,
        spki_sha256="bb" * 32,
        receipt_key=RECEIPT_KEY.public_key().public_bytes_raw().hex(),
        model_digest="cc" * 32,
        configuration=CONFIGURATION,
    )
    return msgspec.structs.replace(plain, **changes)
