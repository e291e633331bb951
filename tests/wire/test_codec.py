"""The codec: every message survives it, and no bytes make it raise anything but ProtocolError."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tsqp.config.dtype import COMPUTE_DTYPES, WIRE_DTYPES
from tsqp.config.groups import GroupName
from tsqp.errors import ProtocolError
from tsqp.wire.codec import MAX_CONTROL_BYTES, Decoder, decode_handshake, decode_reply, decode_to_worker, encode
from tsqp.wire.messages import (
    AttentionScores,
    AttentionValues,
    Done,
    Embed,
    Failed,
    GroupShape,
    Hello,
    Linear,
    Message,
    MultiplyPads,
    Product,
    Refused,
    StagedDone,
    Welcome,
)

CALL_ID = st.integers(0, 2**62 - 1)
COUNT = st.integers(1, 2**31 - 1)
INDEX = st.integers(0, 2**31 - 1)
FINGERPRINT = st.text("0123456789abcdef", min_size=64, max_size=64)
DTYPE = st.sampled_from(COMPUTE_DTYPES)
PATH = st.sampled_from(["float", "int8", "field"])
GROUP = st.sampled_from(get_args(GroupName))
SHARD = st.none() | st.sampled_from(["8..17", "0..17/0..1of2", "99999..99999/9999..9999of9999"])
DEVICE = st.just("cpu") | st.integers(0, 999).map("cuda:{}".format)
REASON = st.text(st.characters(codec="utf-8"), max_size=500)

# As docs/protocol.md shows it: a stranger who writes a worker compares with this.
HELLO = (
    bytes.fromhex("95 a5 68656c6c6f 04 d940"),
    b"0123456789abcdef" * 4,
    bytes.fromhex("a7 666c6f61743332 a5 6669656c64"),
)

TO_WORKER = st.one_of(
    st.builds(Hello, INDEX, FINGERPRINT, st.sampled_from(WIRE_DTYPES), PATH),
    st.builds(Linear, CALL_ID, GROUP, st.none() | INDEX, st.none() | INDEX, COUNT),
    st.builds(Product, CALL_ID, GROUP, st.none() | INDEX, COUNT, st.sampled_from([2, 4])),
    st.builds(MultiplyPads, CALL_ID, GROUP, st.none() | INDEX, st.integers(1, 4096)),
    st.builds(Embed, CALL_ID, COUNT),
    st.builds(AttentionScores, CALL_ID, COUNT, COUNT),
    st.builds(AttentionValues, CALL_ID, COUNT, COUNT),
)
SHAPES = st.lists(st.builds(GroupShape, GROUP, COUNT, COUNT, st.none() | FINGERPRINT), max_size=8).map(tuple)
HANDSHAKE = st.one_of(
    st.builds(Welcome, INDEX, FINGERPRINT, SHAPES, DEVICE, DTYPE, SHARD), st.builds(Refused, INDEX, FINGERPRINT, REASON)
)
STAGE = st.tuples(st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1))
REPLY = st.one_of(
    st.builds(Done, CALL_ID),
    st.builds(StagedDone, CALL_ID, st.integers(0, 2**62 - 1), st.tuples(STAGE, STAGE, STAGE)),
    st.builds(Failed, CALL_ID, REASON),
)

SIDES: dict[str, tuple[Decoder[Any], st.SearchStrategy[Any]]] = {
    "to worker": (decode_to_worker, TO_WORKER),
    "handshake": (decode_handshake, HANDSHAKE),
    "reply": (decode_reply, REPLY),
}
every_side = pytest.mark.parametrize("side", SIDES)


def message_or_protocol_error(decode: Decoder[Any], frame: bytes) -> None:
    try:
        assert isinstance(decode(frame), Message)
    except ProtocolError as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 1000


@every_side
@given(data=st.data())
def test_every_message_survives(side: str, data: st.DataObject) -> None:
    decode, messages = SIDES[side]
    message = data.draw(messages)
    frame = encode(message)
    assert len(frame) <= MAX_CONTROL_BYTES
    assert decode(frame) == message
    assert decode(memoryview(frame)) == message


@every_side
@given(frame=st.binary(max_size=300))
@example(frame=b"\x91" * 4096)  # deep nesting
@example(frame=b"\xdd\xff\xff\xff\xff")  # an array of 2**32 - 1 elements
@example(frame=b"\xdf\xff\xff\xff\xff")  # a map of as many
@example(frame=b"\x92\xdb\xff\xff\xff\xff")  # a text of 4 GiB
@example(frame=b"\x93\xa6failed\x01\xc6\xff\xff\xff\xff")  # bytes of 4 GiB where a text belongs
@example(frame=b"\x93\xa6failed\x01\xa2\xff\xfe")  # invalid UTF-8
@example(frame=b"\x91\xa5\x1b[31m")  # a terminal sequence for a tag
@example(frame=b"\x92\xa4done\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00")  # 1.0 for 1
@example(frame=b"\x92\xa4done\xc3")  # true for 1
def test_any_bytes_are_a_message_or_a_protocol_error(side: str, frame: bytes) -> None:
    message_or_protocol_error(SIDES[side][0], frame)


@every_side
@given(data=st.data())
def test_damaged_messages_are_a_message_or_a_protocol_error(side: str, data: st.DataObject) -> None:
    decode, messages = SIDES[side]
    frame = bytearray(encode(data.draw(messages)))
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    message_or_protocol_error(decode, bytes(frame))


@every_side
@given(data=st.data())
def test_messages_cut_short_or_drawn_out_are_refused(side: str, data: st.DataObject) -> None:
    decode, messages = SIDES[side]
    frame = encode(data.draw(messages))
    with pytest.raises(ProtocolError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])
    with pytest.raises(ProtocolError):
        decode(frame + data.draw(st.binary(min_size=1, max_size=10)))


@pytest.mark.parametrize(
    "fields",
    [
        ["done"],
        ["done", -1],
        ["done", 2**63],
        ["done", 1.0],
        ["done", True],
        ["done", "1"],
        ["done", None],
        ["done", 1, -1],
        ["done", 1, 2**62],
        ["done", 1, 2.0],
        ["done", 1, 2, 3],
        ["failed", 1, "x" * 501],
        ["hello", 1, "0" * 64, "float32"],
        ["os.system", 1],
        [0, 1],
        {"type": "done", "id": 1},
    ],
    ids=str,
)
def test_what_is_almost_a_reply_is_refused(fields: object) -> None:
    with pytest.raises(ProtocolError):
        decode_reply(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "fields",
    [
        ["linear", 0, "qkv", 0, None, 0],
        ["linear", 0, "nothing", 0, None, 1],
        ["linear", 0, "qkv", -1, None, 1],
        ["hello", 1, "0" * 63, "float32"],
        ["hello", 1, "G" * 64, "float32"],
        ["hello", 1, "0" * 64 + "\n", "float32"],
        ["hello", 1, "0" * 64, "object"],
        ["hello", 1, "0" * 64, "float32", "double"],
        ["hello", 1, "0" * 64, "float32", "field", 1],
        ["product", 0, "qkv", 0, 1, 3],
        ["product", 0, "qkv", 0, 0, 4],
        ["product", 0, "nothing", 0, 1, 4],
        ["multiply_pads", 0, "qkv", 0, 0],
        ["multiply_pads", 0, "qkv", 0, 4097],
        ["done", 1],
    ],
    ids=str,
)
def test_what_is_almost_a_call_is_refused(fields: object) -> None:
    with pytest.raises(ProtocolError):
        decode_to_worker(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("device", "good"),
    [
        ("cuda:0,cuda:1", True),
        (",".join(f"cuda:{n}" for n in range(32)), True),
        (",".join(f"cuda:{n}" for n in range(33)), False),
        ("cpu,cuda:0", False),
        ("cuda:0,", False),
        ("cuda:0 cuda:1", False),
        ("cuda:0,\x1b[2J", False),
    ],
)
def test_several_devices_are_named_and_nothing_else_is(device: str, good: bool) -> None:
    """A client prints it."""
    frame = msgspec.msgpack.encode(["welcome", 3, "0" * 64, [], device, "float32"])
    if good:
        assert decode_handshake(frame) == Welcome(3, "0" * 64, (), device, "float32")
    else:
        with pytest.raises(ProtocolError):
            decode_handshake(frame)


@pytest.mark.parametrize(
    ("shard", "good"),
    [
        (None, True),
        ("0..17", True),
        ("0..17/0..1of2", True),
        ("0..17\n", False),
        ("0..17/", False),
        ("", False),
        ("0..17/0..1of2\x1b[2J", False),
        (17, False),
    ],
)
def test_a_shard_is_named_and_nothing_else_is(shard: object, good: bool) -> None:
    """A client prints it."""
    frame = msgspec.msgpack.encode(["welcome", 4, "0" * 64, [], "cpu", "field", shard])
    if good:
        assert decode_handshake(frame) == Welcome(4, "0" * 64, (), "cpu", "field", shard)  # type: ignore[arg-type]
    else:
        with pytest.raises(ProtocolError):
            decode_handshake(frame)


def test_size_is_checked_before_anything_is_decoded() -> None:
    with pytest.raises(ProtocolError, match="limit is 4096"):
        decode_reply(b"\xc1" * (MAX_CONTROL_BYTES + 1))
    floats: Any = memoryview(bytearray(4 * MAX_CONTROL_BYTES)).cast("f")
    with pytest.raises(ProtocolError, match="limit is 4096"):
        decode_reply(floats)


def test_a_hello_has_the_bytes_of_the_page_on_the_protocol() -> None:
    begin, fingerprint, end = HELLO
    assert encode(Hello(4, fingerprint.decode(), "float32", "field")) == begin + fingerprint + end
    assert len(begin + fingerprint + end) == 88
