"""A roster is hostile input: what is read is bounded, and names only whom the trusted side may talk to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.public_keys import KEYS
from tsqp.errors import RosterError
from tsqp.wire.roster import MOST_BYTES, MOST_MEMBERS, Member, Roster, read_roster, roster_document

KEY, OTHER_KEY = KEYS[:2]


def document(*workers: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"version": 1, "epoch": 7, "workers": workers, **fields}).encode()


def worker(address: str = "tcp://10.0.0.1:7000", shard: str = "0..17", key: str | None = KEY) -> dict[str, Any]:
    return {"address": address, "shard": shard, "key": key}


def test_a_roster_says_who_there_is() -> None:
    roster = read_roster(document(worker(), {"address": "tcp://localhost:1", "shard": "0..17/1..2of2"}))
    assert roster == Roster(
        1, 7, (Member("tcp://10.0.0.1:7000", "0..17", KEY), Member("tcp://localhost:1", "0..17/1..2of2"))
    )
    assert [member.name for member in roster.workers] == [KEY, "tcp://localhost:1"]


def test_what_is_written_is_read() -> None:
    members = [Member("shm:///run/a.sock", "0..3"), Member("tcp://worker.example:7000", "3..5", KEY)]
    assert read_roster(roster_document(3, members)) == Roster(1, 3, tuple(members))
    with pytest.raises(RosterError, match="no key"):
        roster_document(3, [Member("tcp://10.0.0.1:7000", "0..3")])


def test_an_address_has_one_form_so_that_a_worker_has_one_name() -> None:
    same = read_roster(document(worker("TCP://x:1".lower(), key=KEY), worker("tcp://LOCALHOST:07", key=None)))
    assert same.workers[1].name == "tcp://localhost:7"
    with pytest.raises(RosterError, match="two workers by the name of tcp://localhost:7"):
        read_roster(document(worker("tcp://LOCALHOST:07", key=None), worker("tcp://localhost:7", key=None)))


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("tcp://127.0.0.1:7000", KEY),
        ("tcp://127.0.0.1:7000", None),
        ("tcp://[::1]:7000", None),
        ("tcp://[fd00::1]:7000", KEY),
        ("shm:///run/user/0/x.sock", None),
        ("ipc:///run/user/0/x.sock", None),
    ],
)
def test_addresses_that_may_be_connected_to(address: str, key: str | None) -> None:
    (member,) = read_roster(document(worker(address, key=key))).workers
    assert (member.address, member.key) == (address, key)


@pytest.mark.parametrize(
    ("address", "key", "says"),
    [
        ("tcp://10.0.0.1:7000", None, "no key for tcp://10.0.0.1:7000"),
        ("tcp://0.0.0.0:7000", None, "no key"),
        ("tcp://localhost.evil.example:7000", None, "no key"),
        ("tcp://127.0.0.1.evil.example:7000", None, "no key"),
        ("tcp://127.0.0.1:0", None, "port 0"),
        ("shm:///run/x.sock", KEY, "only tcp addresses have keys"),
        ("cuda:///run/x.sock", None, "tcp, shm and ipc"),
        ("mem:x", None, "tcp, shm and ipc"),
        ("roster+tcp://127.0.0.1:1", None, "malformed address"),
        ("tcp://127.0.0.1:7000\n", None, "malformed address"),
        ("tcp://10.0.0.1:7000", "#" * 40, "no public key"),  # characters of Z85, and more than 32 bytes
        ("tcp://10.0.0.1:7000", "é" * 40, "no public key"),
        ("tcp://10.0.0.1:7000", "'" * 40, "no public key"),
        ("tcp://10.0.0.1:7000", KEY[:39], "none of version 1"),
    ],
)
def test_addresses_and_keys_that_are_refused(address: str, key: str | None, says: str) -> None:
    with pytest.raises(RosterError, match=says) as caught:
        read_roster(document(worker(address, key=key)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("shard", ["", "0..0", "3..1", "0..17/0..3of2", "0..17\n", "0..17/0..1of9999", "a", "0..17 "])
def test_a_shard_that_is_none_is_refused(shard: str) -> None:
    with pytest.raises(RosterError):
        read_roster(document(worker(shard=shard)))


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"version": "1"},
        {"version": True},
        {"epoch": -1},
        {"epoch": 2**62},
        {"epoch": 1.5},
        {"workers": None},
        {"workers": {}},
        {"more": 1},
        {"\x1b[2J" * 400: 1},
    ],
)
def test_another_document_is_refused_in_one_printable_line(fields: dict[str, Any]) -> None:
    with pytest.raises(RosterError, match="none of version 1") as caught:
        read_roster(document(worker(), **fields))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_member_has_no_fields_of_its_own() -> None:
    with pytest.raises(RosterError):
        read_roster(document({**worker(), "weight": 1}))


def test_a_key_names_one_worker() -> None:
    one, other = worker(), worker("tcp://10.0.0.2:7000")
    with pytest.raises(RosterError, match="two workers by the name of"):
        read_roster(document(one, other))
    assert len(read_roster(document(one, {**other, "key": OTHER_KEY})).workers) == 2


def test_a_roster_has_bounds() -> None:
    few = [{"address": f"tcp://localhost:{port}", "shard": "0..1"} for port in range(1, MOST_MEMBERS + 1)]
    assert len(read_roster(document(*few)).workers) == MOST_MEMBERS
    with pytest.raises(RosterError):
        read_roster(document(*few, {"address": "tcp://localhost:9000", "shard": "0..1"}))
    full = document(worker())
    assert read_roster(full.ljust(MOST_BYTES)).epoch == 7
    with pytest.raises(RosterError, match="the limit is 1048576"):
        read_roster(full.ljust(MOST_BYTES + 1))
    with pytest.raises(RosterError):
        read_roster(b"[" * MOST_BYTES)  # as deep as it is long


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
members = st.fixed_dictionaries(
    {"address": st.sampled_from(["tcp://127.0.0.1:1", "shm:///x", "tcp://h:1"]) | st.text(max_size=40)},
    optional={"shard": st.sampled_from(["0..1", "0..2/0..1of2"]) | json_values, "key": st.just(KEY) | json_values},
)
documents = st.fixed_dictionaries(
    {"version": st.just(1) | json_values, "epoch": st.integers(-1, 3) | json_values},
    optional={"workers": st.lists(members, max_size=3) | json_values},
)


def refused_or_holds(data: bytes) -> None:
    """Nothing but a RosterError with one printable line, or a roster that can be written and read again."""
    fault, roster = "", None
    try:
        roster = read_roster(data)
    except RosterError as error:
        fault = str(error)
    assert fault.isprintable()
    if roster is not None:
        assert read_roster(roster_document(roster.epoch, list(roster.workers))) == roster


@given(documents.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
def test_garbage_is_a_roster_error_or_a_roster_that_holds(data: bytes) -> None:
    refused_or_holds(data)


GOOD = document(worker(), worker("tcp://localhost:7000", "0..17/0..1of2", None))


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@example(GOOD.index(b"tcp"), 0xFF)  # not UTF-8, and JSON otherwise
@example(GOOD.index(b"0..17"), 0xC0)
@example(GOOD.index(KEY.encode()), 0x80)
@example(GOOD.index(b"version"), 0xFF)
def test_a_good_roster_with_one_other_byte_is_refused_or_holds(place: int, byte: int) -> None:
    refused_or_holds(GOOD[:place] + bytes([byte]) + GOOD[place + 1 :])
