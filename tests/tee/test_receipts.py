"""A receipt is of one request, one answer and one server: whatever else is said of it is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tee.some_receipts import ANSWER, OPENING, REQUEST, TOKENS, check_tokens, evidence, receipt, signed
from tests.tee.statements import CONFIGURATION, RECEIPT_KEY
from tsqp.errors import EvidenceRefused
from tsqp.tee.receipts import (
    MAX_HEADER_BYTES,
    MAX_RECEIPT_BYTES,
    Checks,
    Opening,
    Sampling,
    SignedReceipt,
    Tokens,
    canonical_tokens,
    read_receipt,
    salted_sha256,
    sign_receipt,
)

SIGNED = signed()
JSON = msgspec.json.encode(SIGNED)
FIELDS = json.loads(JSON)
LARGE = (1 << 53, (1 << 63) - 1)


def places(fields: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of an object, and of those within."""
    for name, value in fields.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from places(value, (*at, name))


def changed(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The fields with another value at a place; ``...`` takes the field out."""
    fields = json.loads(JSON)
    within = fields
    for name in place[:-1]:
        within = within[name]
    if value is ...:
        del within[place[-1]]
    else:
        within[place[-1]] = value
    return fields


PLACES = list(places(FIELDS))
SIGNED_PLACES = [place for place in PLACES if place[0] == "receipt" and len(place) > 1]


def check(data: bytes) -> SignedReceipt:
    found = read_receipt(data)
    found.check_signature()
    found.check_request(REQUEST)
    found.check_answer(ANSWER)
    check_tokens(found, TOKENS)
    return found


def test_it_crosses_unchanged_as_json_and_as_a_header() -> None:
    header = SIGNED.to_header()
    assert check(JSON) == check(header.encode()) == check(f"X-TSQP-Receipt: {header}\r\n".encode()) == SIGNED
    assert check(json.dumps(FIELDS, indent=2).encode()) == SIGNED
    assert "=" not in header


def test_what_is_signed_is_as_the_page_says() -> None:
    text = json.dumps(FIELDS["receipt"], sort_keys=True, separators=(",", ":"))
    RECEIPT_KEY.public_key().verify(SIGNED.signature, b"tsqp-receipt-v1" + text.encode())
    assert hashlib.sha256(b"\x0a" * 32 + REQUEST).hexdigest() == SIGNED.receipt.request_sha256
    assert hashlib.sha256(b"\x0c" * 32 + b"[[5,6,7]]").hexdigest() == SIGNED.receipt.tokens_sha256
    assert canonical_tokens([[1, 20], []]) == b"[[1,20],[]]"


@pytest.mark.parametrize("place", SIGNED_PLACES, ids=".".join)
@settings(max_examples=20)
@given(data=st.data())
def test_no_signed_field_can_be_changed(place: tuple[str, ...], data: st.DataObject) -> None:
    right = FIELDS
    for name in place:
        right = right[name]
    numbers = st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    others: st.SearchStrategy[Any] = st.none() | st.booleans() | st.text(max_size=70) | numbers | st.just({})
    hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
    value = data.draw((others | hexes | st.just(...)).filter(lambda one: one is ... or not same(one, right)))
    with pytest.raises(EvidenceRefused):
        check(json.dumps(changed(place, value)).encode())


def same(one: Any, other: Any) -> bool:
    """As JSON has it: 1 and 1.0 are one number, true is none."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_no_field_can_be_missing_or_beside_others(place: tuple[str, ...]) -> None:
    with pytest.raises(EvidenceRefused):
        check(json.dumps(changed(place, ...)).encode())
    with pytest.raises(EvidenceRefused):
        check(json.dumps(changed((*place[:-1], "more"), 1)).encode())


@given(at=st.integers(0, len(JSON) - 1), byte=st.integers(0, 255))
def test_no_byte_of_the_json_can_be_changed(at: int, byte: int) -> None:
    data = bytearray(JSON)
    data[at] = byte
    refused_or_the_same(bytes(data))


@given(at=st.integers(0, len(SIGNED.to_header()) - 1), byte=st.integers(0, 255))
def test_no_byte_of_the_header_can_be_changed(at: int, byte: int) -> None:
    data = bytearray(SIGNED.to_header().encode())
    data[at] = byte
    refused_or_the_same(bytes(data))


@given(end=st.integers(0, len(JSON) - 1))
def test_no_part_of_it_is_one(end: int) -> None:
    with pytest.raises(EvidenceRefused):
        check(JSON[:end])
    with pytest.raises(EvidenceRefused):
        check(base64.urlsafe_b64encode(JSON[:end]))


@given(data=st.binary(max_size=300))
def test_whatever_else_is_read_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceRefused):
        read_receipt(data)


def refused_or_the_same(data: bytes) -> None:
    try:
        found = check(data)
    except EvidenceRefused:
        return
    assert found == SIGNED


def test_a_key_of_somebody_else_signs_nothing() -> None:
    forged = sign_receipt(SIGNED.receipt, OPENING, Ed25519PrivateKey.generate())
    with pytest.raises(EvidenceRefused, match="signature is one that is wrong"):
        forged.check_signature()
    other = Ed25519PrivateKey.generate()
    own = sign_receipt(receipt(receipt_key=other.public_key().public_bytes_raw().hex()), OPENING, other)
    own.check_signature()
    with pytest.raises(EvidenceRefused, match=r"receipt-key is .* as in the evidence"):
        own.check_attested(evidence())


def test_it_is_of_one_request_and_one_answer() -> None:
    with pytest.raises(EvidenceRefused, match="refused: request is one with the salted hash"):
        SIGNED.check_request(REQUEST + b" ")
    with pytest.raises(EvidenceRefused, match="refused: answer is one with the salted hash"):
        SIGNED.check_answer(ANSWER.replace(b"an", b"no"))
    with pytest.raises(EvidenceRefused, match="refused: tokens is one with the salted hash"):
        check_tokens(SIGNED, [[5, 6], [7]])


def test_without_a_salt_it_says_nothing_of_the_text() -> None:
    closed = msgspec.structs.replace(SIGNED, opening=Opening(request=None, answer="0b" * 32, tokens=None))
    assert read_receipt(msgspec.json.encode(closed)) == closed
    closed.check_signature()
    closed.check_answer(ANSWER)
    with pytest.raises(EvidenceRefused, match=r"opening\.request is null"):
        closed.check_request(REQUEST)


def test_another_salt_opens_nothing() -> None:
    other = msgspec.structs.replace(SIGNED, opening=Opening.drawn())
    with pytest.raises(EvidenceRefused, match="request"):
        other.check_request(REQUEST)


def test_salts_are_drawn_for_each_text_and_each_receipt() -> None:
    drawn = [salt for _ in range(4) for salt in msgspec.structs.astuple(Opening.drawn())]
    assert len(set(drawn)) == 12
    assert all(salt is not None and len(salt) == 64 for salt in drawn)
    assert salted_sha256("00" * 32, REQUEST) != salted_sha256("01" * 32, REQUEST)


def test_evidence_of_the_same_server_attests_it() -> None:
    SIGNED.check_attested(evidence())
    SIGNED.check_attested(evidence(nonce="99" * 32))  # evidence is asked for again and again


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_digest": "dd" * 32}, "model-digest"),
        ({"spki_sha256": "dd" * 32}, "identity"),
        ({"configuration": msgspec.structs.replace(CONFIGURATION, protection="verified")}, "protection"),
        ({"configuration": msgspec.structs.replace(CONFIGURATION, software="tsqp 0.0.9")}, "software"),
        ({"configuration": msgspec.structs.replace(CONFIGURATION, soundness_bits=1)}, "identity"),
    ],
)
def test_evidence_of_another_server_attests_nothing(change: dict[str, Any], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=f"refused: {told} is "):
        SIGNED.check_attested(evidence(**change))


def test_checks_are_those_of_the_evidence() -> None:
    with pytest.raises(EvidenceRefused, match=r"checks\.soundness-bits is 99, and not 62"):
        signed(checks=Checks(soundness_bits=99, products=1)).check_attested(evidence())


def test_an_adapter_is_one_of_the_evidence() -> None:
    signed(adapter="22" * 32).check_attested(evidence())
    with pytest.raises(EvidenceRefused, match=r"adapter is 33.* one of those in the evidence"):
        signed(adapter="33" * 32).check_attested(evidence())


def test_the_largest_fits_into_a_header() -> None:
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    sampling = Sampling(
        **dict.fromkeys(floats, -1.2345678901234567e-300),
        top_k=LARGE[0],
        seed=-LARGE[1],
        max_tokens=LARGE[0],
        ignore_eos=False,
    )
    words = dict.fromkeys(("id", "software", "protection", "kv_dtype"), "x" * 128)
    checks, tokens = Checks(soundness_bits=4096, products=LARGE[0]), Tokens(prompt=LARGE[0], answer=LARGE[0])
    large = signed(**words, made_at=253_402_300_799, adapter="aa" * 32, checks=checks, tokens=tokens, sampling=sampling)
    assert len(large.to_header()) <= MAX_HEADER_BYTES
    assert read_receipt(large.to_header().encode()) == large


def test_a_file_is_bounded() -> None:
    with pytest.raises(EvidenceRefused, match="receipt is 16385 bytes or more"):
        read_receipt(b" " * (MAX_RECEIPT_BYTES + 1))
