"""Whatever a worker answers, the trusted side refuses it by name and the session stays dead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import linear_groups
from tsqp.config.shard import Shard, said
from tsqp.errors import (
    ChannelError,
    ModelMismatch,
    ProtocolError,
    ReplyShapeError,
    WorkerFailed,
)
from tsqp.trusted.remote.linears import OpenLinears
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.trusted.trace import Trace
from tsqp.wire.channel import Frames, SlotsByReserve
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Done, Failed, GroupShape, Hello, Linear, Product, Refused, Welcome

CHECKPOINT = open_checkpoint("synthetic:tiny")
CONFIG = CHECKPOINT.config
FINGERPRINT = CHECKPOINT.fingerprint()
GROUPS = tuple(GroupShape(g.name, g.in_features, g.out_features) for g in linear_groups(CONFIG).values())
WELCOME = Welcome(PROTOCOL_VERSION, FINGERPRINT, GROUPS, "cpu", "float32")

Answer = Callable[[Linear], Frames]


class ScriptedChannel(SlotsByReserve):
    """A channel whose worker answers what the test says."""

    transport = "mem"
    address = "mem:scripted"

    def __init__(self, hello: Frames, answer: Answer | None = None) -> None:
        self._hello = hello
        self._answer = answer
        self._replies: deque[Frames] = deque()
        self.closed = False

    def reserve(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        message = decode_to_worker(frames.control)
        if isinstance(message, Hello):
            self._replies.append(self._hello)
        elif self._answer is not None and isinstance(message, Linear):
            self._replies.append(self._answer(message))

    def arrived(self, within_s: float) -> bool:
        return bool(self._replies)

    def receive(self, deadline_s: float) -> Frames:
        return self._replies.popleft()

    def close(self) -> None:
        self.closed = True


def open_session(channel: ScriptedChannel, **options: Any) -> WorkerSession:
    return WorkerSession(
        channel, CONFIG, FINGERPRINT, wire_dtype="float32", dtype="float32", stats=Stats(), deadline_s=1.0, **options
    )


def payload(elements: int) -> tuple[memoryview]:
    return (memoryview(bytearray(4 * elements)),)


def right(call: Linear) -> Frames:
    group = linear_groups(CONFIG)[call.group]
    return Frames(encode(Done(call.id)), payload(call.rows * group.out_features))


HOSTILE: dict[str, tuple[Answer, type[ChannelError]]] = {
    "too short": (lambda call: Frames(encode(Done(call.id)), payload(3)), ReplyShapeError),
    "one row too many": (lambda call: right(Linear(call.id, call.group, 0, None, call.rows + 1)), ReplyShapeError),
    "empty": (lambda call: Frames(encode(Done(call.id)), payload(0)), ReplyShapeError),
    "no payload": (lambda call: Frames(encode(Done(call.id))), ProtocolError),
    "two payloads": (lambda call: Frames(encode(Done(call.id)), payload(1) * 2), ProtocolError),
    "an old id": (lambda call: Frames(encode(Done(call.id - 1)), right(call).tensors), ProtocolError),
    "a future id": (lambda call: Frames(encode(Done(call.id + 1)), right(call).tensors), ProtocolError),
    "garbage": (lambda call: Frames(b"\xc1\xff"), ProtocolError),
    "a call": (lambda call: Frames(encode(call)), ProtocolError),
    "a second welcome": (lambda call: Frames(encode(WELCOME)), ProtocolError),
    "failure": (lambda call: Frames(encode(Failed(call.id, "no\x1b[31m memory"))), WorkerFailed),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_ends_the_session(name: str) -> None:
    answer, expected = HOSTILE[name]
    channel = ScriptedChannel(Frames(encode(WELCOME)), answer)
    session = open_session(channel)
    linears = OpenLinears(session, split=False)
    x = torch.zeros(2, CONFIG.hidden_size)
    with pytest.raises(expected) as first:
        linears.start(("qkv", 0), x).wait()
    assert "\x1b" not in str(first.value)  # a worker's words cannot drive the user's terminal
    assert channel.closed
    with pytest.raises(expected):
        linears.start(("qkv", 0), x)


@pytest.mark.parametrize("busy_ns", [0, 1, 2**62 - 1])
def test_a_worker_may_lie_about_its_time_without_effect(busy_ns: int) -> None:
    def boastful(call: Linear) -> Frames:
        return Frames(encode(Done(call.id, busy_ns)), right(call).tensors)

    session = open_session(ScriptedChannel(Frames(encode(WELCOME)), boastful))
    trace = session.stats.trace = Trace()
    product = OpenLinears(session, split=False).start(("qkv", 0), torch.zeros(2, CONFIG.hidden_size)).wait()
    assert not product.any()
    row = session.stats.calls["linear"]
    assert 0.0 <= row.worker_s <= row.rpc_s  # cut to the time that the call was under way
    (call,) = [span for span in trace.spans if span.track == "call"]
    assert call.name == "qkv"
    assert call.details["busy_s"] == row.worker_s


def test_replies_may_come_in_another_order() -> None:
    class Reversed(ScriptedChannel):
        def receive(self, deadline_s: float) -> Frames:
            return self._replies.pop()

    def numbered(call: Linear) -> Frames:
        group = linear_groups(CONFIG)[call.group]
        data = torch.full((call.rows, group.out_features), float(call.id))
        return Frames(encode(Done(call.id)), (data.numpy().data.cast("B"),))

    session = open_session(Reversed(Frames(encode(WELCOME)), numbered))
    linears = OpenLinears(session, split=False)
    pending = [linears.start(("qkv", 0), torch.zeros(1, CONFIG.hidden_size)) for _ in range(3)]
    assert [float(p.wait()[0, 0]) for p in pending] == [1.0, 2.0, 3.0]


BAD_GREETINGS: dict[str, tuple[Frames, type[ChannelError], str]] = {
    "another model": (
        Frames(encode(Refused(PROTOCOL_VERSION, "0" * 64, "it holds another model"))),
        ModelMismatch,
        "another model",
    ),
    "another fingerprint": (
        Frames(encode(Welcome(PROTOCOL_VERSION, "0" * 64, GROUPS, "cpu", "float32"))),
        ModelMismatch,
        "holds another model",
    ),
    "other shapes": (
        Frames(encode(Welcome(PROTOCOL_VERSION, FINGERPRINT, GROUPS[:-1], "cpu", "float32"))),
        ModelMismatch,
        "holds another model",
    ),
    "another path": (
        Frames(encode(Welcome(PROTOCOL_VERSION, FINGERPRINT, GROUPS, "cpu", "int8"))),
        ModelMismatch,
        "computes in int8",
    ),
    "another version": (
        Frames(encode(Welcome(PROTOCOL_VERSION + 1, FINGERPRINT, GROUPS, "cpu", "float32"))),
        ProtocolError,
        "protocol",
    ),
    "a shard": (
        Frames(encode(Welcome(PROTOCOL_VERSION, FINGERPRINT, GROUPS, "cpu", "float32", "0..2"))),
        ModelMismatch,
        r"holds shard 0\.\.2, not the whole model",
    ),
    "all of the model in other words": (
        Frames(encode(Welcome(PROTOCOL_VERSION, FINGERPRINT, GROUPS, "cpu", "float32", "0..3"))),
        ModelMismatch,
        r"holds shard 0\.\.3, not the whole model",
    ),
    "payloads": (Frames(encode(WELCOME), payload(1)), ProtocolError, "payloads"),
    "garbage": (Frames(b"hello"), ProtocolError, "valid message"),
    "a reply": (Frames(encode(Done(1))), ProtocolError, "valid message"),
}


@pytest.mark.parametrize("name", BAD_GREETINGS)
def test_a_bad_greeting_is_refused_and_the_channel_closed(name: str) -> None:
    greeting, expected, words = BAD_GREETINGS[name]
    channel = ScriptedChannel(greeting)
    with pytest.raises(expected, match=words):
        open_session(channel)
    assert channel.closed


HALF = Shard(1, 3, 0, 1, 2)  # of the second of two layers, and of the LM head
SLICES = tuple(msgspec.structs.replace(g, out_features=g.out_features // 2, digest="ab" * 32) for g in GROUPS)
OF_HALF = Welcome(PROTOCOL_VERSION, FINGERPRINT, SLICES, "cpu", "field", str(HALF))
DIGESTS = {group.name: "ab" * 32 for group in SLICES}


def test_a_worker_of_the_shard_that_was_asked_for_is_taken() -> None:
    session = open_session(ScriptedChannel(Frames(encode(OF_HALF))), path="field", digests=DIGESTS, shard=HALF)
    assert session.shard == HALF
    assert open_session(ScriptedChannel(Frames(encode(WELCOME)))).shard == Shard(0, 3)


BAD_SHARDS: dict[str, tuple[Welcome, str]] = {
    "the other half": (
        msgspec.structs.replace(OF_HALF, shard="1..3/1..2of2"),
        r"holds shard 1\.\.3/1\.\.2of2, not shard",
    ),
    "other layers": (msgspec.structs.replace(OF_HALF, shard="0..2/0..1of2"), r"holds shard 0\.\.2/0\.\.1of2, not"),
    "no shard": (msgspec.structs.replace(OF_HALF, shard=None), "holds the whole model, not shard"),
    "not in lowest terms": (msgspec.structs.replace(OF_HALF, shard="1..3/0..2of4"), "not shard"),
    "one that cannot be": (msgspec.structs.replace(OF_HALF, shard="3..1/9..1of2"), "not shard"),
    "whole groups": (msgspec.structs.replace(OF_HALF, groups=GROUPS), "another model"),
    "a group too few": (msgspec.structs.replace(OF_HALF, groups=SLICES[:-1]), "another model"),
    "other weights": (
        msgspec.structs.replace(OF_HALF, groups=(*SLICES[:-1], msgspec.structs.replace(SLICES[-1], digest="ac" * 32))),
        "another model",
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_worker_of_another_shard_is_refused(name: str) -> None:
    welcome, words = BAD_SHARDS[name]
    channel = ScriptedChannel(Frames(encode(welcome)))
    with pytest.raises(ModelMismatch, match=words):
        open_session(channel, path="field", digests=DIGESTS, shard=HALF)
    assert channel.closed


@pytest.mark.parametrize(
    ("text", "group", "layer", "width"),
    [
        ("0..3", "o", 0, CONFIG.hidden_size),
        ("1..3/0..1of2", "o", 1, CONFIG.hidden_size // 2),
        ("2..3/0..1of4", "lm_head", None, CONFIG.vocab_size // 4),
    ],
)
def test_a_ping_is_a_product_that_the_worker_has(text: str, group: str, layer: int | None, width: int) -> None:
    asked: list[tuple[Product, int]] = []

    class Pinged(ScriptedChannel):
        def send(self, frames: Frames, reply_bytes: int = 0) -> None:
            call = decode_to_worker(frames.control)
            if isinstance(call, Product):
                asked.append((call, reply_bytes))
                assert bytes(frames.tensors[0]) == bytes(4 * linear_groups(CONFIG)[call.group].in_features)
                self._replies.append(Frames(encode(Done(call.id)), payload(width)))
            else:
                super().send(frames, reply_bytes)

    shard = Shard.parse(text)
    shapes = tuple(GroupShape(g.name, g.in_features, shard.width(g)) for g in shard.groups(CONFIG))
    welcome = Welcome(PROTOCOL_VERSION, FINGERPRINT, shapes, "cpu", "field", said(shard, CONFIG))
    session = open_session(Pinged(Frames(encode(welcome))), path="field", shard=shard)
    session.ping()
    session.ping()
    assert [(call.group, call.layer, call.rows, size) for call, size in asked] == [(group, layer, 1, 4 * width)] * 2
