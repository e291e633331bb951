"""Report data depends on every part of a statement, in the way that docs/attestation.md says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tee.statements import CONFIGURATION, statement
from tsqp.tee.statement import Configuration, handshake_message

HEX32 = st.binary(min_size=32, max_size=32).map(bytes.hex)
CHANGES: dict[str, Any] = {
    "software": "tsqp 0.1.1",
    "protection": "verified",
    "partition": "layer",
    "soundness_bits": 31,
    "worker_keys": ("11" * 32, "12" * 32),
    "dealer_keys": ("11" * 32,),
    "adapters": {"legal": "23" * 32},
    "oblivious": True,
    "embedding": "oram",
    "locked_memory": True,
}


def test_report_data_is_the_hash_that_the_page_says() -> None:
    """Written out once more here, so that a change of order or tag is seen."""
    one = statement()
    configuration = json.dumps(
        {
            "adapters": {"legal": "22" * 32},
            "dealer_keys": [],
            "embedding": "plain",
            "locked_memory": False,
            "oblivious": False,
            "partition": "linear",
            "protection": "masked",
            "software": "tsqp 0.1.0",
            "soundness_bits": 62,
            "worker_keys": ["11" * 32],
        },
        separators=(",", ":"),
    )
    same = (
        b"\xbb" * 32 + bytes.fromhex(one.receipt_key) + b"\xcc" * 32 + hashlib.sha256(configuration.encode()).digest()
    )
    assert one.report_data() == hashlib.sha512(b"tsqp-evidence-v1" + b"\xaa" * 32 + same).digest()
    assert one.identity() == hashlib.sha256(same).digest()


@pytest.mark.parametrize("part", ["nonce", "spki_sha256", "receipt_key", "model_digest"])
def test_each_part_is_bound(part: str) -> None:
    other = statement(**{part: "dd" * 32})
    assert other.report_data() != statement().report_data()
    assert (other.identity() == statement().identity()) == (part == "nonce")


@pytest.mark.parametrize("name", Configuration.__struct_fields__)
def test_each_field_of_the_configuration_is_bound(name: str) -> None:
    other = statement(configuration=msgspec.structs.replace(CONFIGURATION, **{name: CHANGES[name]}))
    assert other.report_data() != statement().report_data()
    assert other.identity() != statement().identity()


@given(st.dictionaries(st.text(min_size=1, max_size=8), HEX32, max_size=4), st.lists(HEX32, max_size=3), st.booleans())
def test_the_canonical_form_survives_the_wire(adapters: dict[str, str], keys: list[str], flag: bool) -> None:
    one = msgspec.structs.replace(CONFIGURATION, adapters=adapters, worker_keys=tuple(keys), oblivious=flag)
    shuffled = dict(reversed(list(msgspec.to_builtins(one).items())))
    assert msgspec.json.decode(json.dumps(shuffled, indent=1), type=Configuration).canonical() == one.canonical()
    assert one.canonical().isascii()


@given(HEX32, HEX32, st.integers(0, 2**63 - 1))
def test_the_handshake_has_one_form(nonce: str, certificate: str, made_at: int) -> None:
    message = handshake_message(bytes.fromhex(nonce), bytes.fromhex(certificate), made_at)
    assert message == b"tsqp-handshake-v1" + bytes.fromhex(nonce + certificate) + made_at.to_bytes(8, "big")


@pytest.mark.parametrize(("nonce", "certificate"), [(31, 33), (33, 31), (32, 0), (64, 0)])
def test_a_handshake_of_other_lengths_is_refused(nonce: int, certificate: int) -> None:
    """Parts of any length could be moved from one to the other under the same signature."""
    with pytest.raises(ValueError, match="32 bytes each"):
        handshake_message(bytes(nonce), bytes(certificate), 0)
