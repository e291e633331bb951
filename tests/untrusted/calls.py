"""Calls to a worker without a connection, and its answers."""

from __future__ import annotations

import torch

from tsqp.checkpoint import open_checkpoint
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.codec import decode_handshake, decode_reply, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Done, Failed, Hello, Message, Refused, Welcome

CHECKPOINT = open_checkpoint("synthetic:tiny")
CONFIG = CHECKPOINT.config
HELLO = Hello(PROTOCOL_VERSION, CHECKPOINT.fingerprint(), "float32")
PEER = b"a client"


def arrival(message: Message | bytes, *payloads: torch.Tensor, peer: bytes = PEER) -> Arrival:
    control = message if isinstance(message, bytes) else encode(message)
    tensors = tuple(memoryview(bytearray(p.contiguous().view(torch.uint8).numpy().tobytes())) for p in payloads)
    return Arrival(peer, Frames(control, tensors), None)


def greet(worker: Worker, hello: Hello = HELLO, peer: bytes = PEER) -> Welcome | Refused:
    frames = worker.answer(arrival(hello, peer=peer))
    assert frames is not None
    return decode_handshake(frames.control)


def answer(worker: Worker, message: Message, *payloads: torch.Tensor) -> Done | Failed:
    frames = worker.answer(arrival(message, *payloads))
    assert frames is not None
    reply = decode_reply(frames.control)
    assert len(frames.tensors) == (1 if isinstance(reply, Done) else 0)
    return reply
