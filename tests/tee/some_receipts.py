"""Receipts for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tests.tee.statements import CERTIFICATE, RECEIPT_KEY, statement
from tsqp.tee.evidence import Evidence, Quote, make_evidence
from tsqp.tee.receipts import (
    Checks,
    Opening,
    Receipt,
    Sampling,
    SignedReceipt,
    Tokens,
    _same_hash,
    canonical_tokens,
    salted_sha256,
    sign_receipt,
)

REQUEST = b'{"model": "m", "messages": [{"role": "user", "content": "a question"}]}'
ANSWER = b'[{"finish_reason":"stop","index":0,"text":"an answer","tool_calls":[]}]'
TOKENS = [[5, 6, 7]]
OPENING = Opening(request="0a" * 32, answer="0b" * 32, tokens="0c" * 32)
MADE_AT = 1_800_000_000


def receipt(**changes: Any) -> Receipt:
    """One of the server of ``statements``, that is right but for ``changes``."""
    stated = statement()
    plain = Receipt(
        version="tsqp-receipt-v1",
        receipt_key=stated.receipt_key,
        identity=stated.identity().hex(),
        id="chatcmpl-1",
        path="/v1/chat/completions",
        made_at=MADE_AT,
        software=stated.configuration.software,
        model_digest=stated.model_digest,
        adapter=None,
        protection=stated.configuration.protection,
        kv_dtype="bfloat16",
        checks=Checks(soundness_bits=stated.configuration.soundness_bits, products=340),
        request_sha256=salted_sha256("0a" * 32, REQUEST),
        answer_sha256=salted_sha256("0b" * 32, ANSWER),
        tokens_sha256=salted_sha256("0c" * 32, canonical_tokens(TOKENS)),
        sampling=Sampling(
            temperature=0.7,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            seed=77,
            max_tokens=16,
            ignore_eos=False,
        ),
        tokens=Tokens(prompt=9, answer=3),
    )
    return msgspec.structs.replace(plain, **changes)


def signed(**changes: Any) -> SignedReceipt:
    """The same, with a signature that is right."""
    return sign_receipt(receipt(**changes), OPENING, RECEIPT_KEY)


def check_tokens(found: SignedReceipt, choices: Sequence[Sequence[int]]) -> None:
    """``choices``: the ids of each one's tokens. Raises EvidenceRefused."""
    _same_hash("tokens", found.opening.tokens, canonical_tokens(choices), found.receipt.tokens_sha256)


def evidence(**changes: Any) -> Evidence:
    """Of the same server, of kind ``none``."""
    stated = statement(**changes)
    return make_evidence(stated, Quote(kind="none", quote=b""), RECEIPT_KEY, CERTIFICATE, MADE_AT)
