"""Evidence is read strictly, and its signature is of this nonce, this certificate and this time."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tee.statements import CERTIFICATE, RECEIPT_KEY, statement
from tsqp.errors import EvidenceRefused
from tsqp.tee.evidence import MAX_EVIDENCE_BYTES, Evidence, Quote, make_evidence, read_evidence

EVIDENCE = make_evidence(
    statement(),
    Quote(kind="tdx", quote=b"\x00quote\xff", certificates=b"more"),
    RECEIPT_KEY,
    CERTIFICATE,
    1_800_000_000,
)
FIELDS = json.loads(EVIDENCE.to_json())


def read(fields: Any) -> Evidence:
    return read_evidence(json.dumps(fields).encode())


def test_it_crosses_unchanged() -> None:
    found = read_evidence(EVIDENCE.to_json())
    assert found == EVIDENCE
    assert found.statement == statement()
    found.check_signature()


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "ab" * 32},
        {"certificate_sha256": "ab" * 32},
        {"made_at": 1},
        {"receipt_key": "ab" * 32},
        {"signature": bytes(64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_signature_covers(change: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefused, match="signature is one that is wrong"):
        msgspec.structs.replace(EVIDENCE, **change).check_signature()


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused(name: str) -> None:
    with pytest.raises(EvidenceRefused, match=name):
        read({key: value for key, value in FIELDS.items() if key != name})


@pytest.mark.parametrize("name", FIELDS["configuration"])
def test_a_missing_field_of_the_configuration_is_refused(name: str) -> None:
    some = {key: value for key, value in FIELDS["configuration"].items() if key != name}
    with pytest.raises(EvidenceRefused, match=name):
        read({**FIELDS, "configuration": some})


@pytest.mark.parametrize(
    "change",
    [
        {"version": "tsqp-evidence-v2"},
        {"kind": "tpm"},
        {"more": 1},
        {"configuration": {**FIELDS["configuration"], "more": 1}},
        {"configuration": {**FIELDS["configuration"], "soundness_bits": True}},
        {"configuration": {**FIELDS["configuration"], "oblivious": 1}},
        {"configuration": {**FIELDS["configuration"], "embedding": "hope"}},
        {"configuration": {**FIELDS["configuration"], "worker_keys": "any"}},
        {"nonce": "AA" * 32},
        {"nonce": "aa" * 31},
        {"nonce": "aa" * 32 + "\n"},
        {"made_at": -1},
        {"made_at": 1 << 54},
        {"made_at": "1"},
        {"signature": ""},
        {"quote": "?"},
        {"quote": "A" * (28 << 10)},
    ],
    ids=str,
)
def test_what_is_unknown_or_of_another_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefused, match=r"^refused: evidence is "):
        read({**FIELDS, **change})


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 60_000, bytes(MAX_EVIDENCE_BYTES + 1)], ids=len)
def test_what_is_no_evidence_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceRefused):
        read_evidence(data)


@given(st.integers(0, len(EVIDENCE.to_json()) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_is_not_in_what_is_signed_here(at: int, flip: int) -> None:
    """What it does not cover, the quote covers: the statement. The quote covers itself."""
    data = bytearray(EVIDENCE.to_json())
    data[at] ^= flip
    try:
        found = read_evidence(bytes(data))
        found.check_signature()
    except EvidenceRefused:
        return
    changed = {name for name in Evidence.__struct_fields__ if getattr(found, name) != getattr(EVIDENCE, name)}
    assert changed <= {"kind", "quote", "certificates", "spki_sha256", "model_digest", "configuration"}


def test_what_a_terminal_obeys_is_escaped() -> None:
    with pytest.raises(EvidenceRefused) as raised:
        read({**FIELDS, "\x1b[2J": 1})
    assert "\x1b" not in str(raised.value)
    assert "\n" not in str(EvidenceRefused("field", "two\nlines", "one"))
