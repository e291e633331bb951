"""A capture is what was sent, as it was when it was sent."""

from __future__ import annotations

from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.audit.capture import Capture
from tsqp.audit.view import View
from tsqp.checkpoint import open_checkpoint
from tsqp.wire.channel import Frames, SlotsByReserve
from tsqp.wire.codec import encode
from tsqp.wire.messages import Hello, Product

PRODUCT = encode(Product(1, "down", 0, 1, 4))


class Line(SlotsByReserve):
    """A channel that keeps what it is given."""

    transport, address = "mem", "mem:line"

    def __init__(self) -> None:
        self.sent: list[tuple[Frames, int]] = []
        self.closed = False

    def reserve(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        self.sent.append((frames, reply_bytes))

    def arrived(self, within_s: float) -> bool:
        return within_s == 7.0

    def receive(self, deadline_s: float) -> Frames:
        return Frames(b"%d" % deadline_s)

    def close(self) -> None:
        self.closed = True


def test_everything_is_passed_on() -> None:
    line = Line()
    channel = Capture().wrap(line)
    frames = Frames(PRODUCT, [channel.reserve(8)])
    channel.send(frames, 16)
    assert line.sent == [(frames, 16)]
    assert channel.receive(7.0).control == b"7"
    assert channel.arrived(7.0)
    assert (channel.transport, channel.address) == ("mem", "mem:line")
    channel.close()
    assert line.closed


def test_a_payload_is_copied_when_it_is_sent() -> None:
    capture = Capture()
    channel = capture.wrap(Line())
    memory = channel.reserve(4)
    memory[:] = b"sent"
    channel.send(Frames(PRODUCT, [memory]))
    memory[:] = b"next"
    assert capture.messages[0].payloads == (b"sent",)
    assert capture.bytes_seen == len(PRODUCT) + 4


def test_beyond_its_bound_a_payload_is_counted_only_but_for_those_that_are_attacked() -> None:
    capture = Capture(keep_bytes=4)
    channel = capture.wrap(Line())
    qkv = encode(Product(2, "qkv", 0, 1, 4))
    for control, payload in ((PRODUCT, b"kept"), (PRODUCT, b"lost"), (qkv, b"kept")):
        channel.send(Frames(control, [memoryview(payload)]))
    assert [seen.payloads for seen in capture.messages] == [(b"kept",), None, (b"kept",)]
    assert capture.bytes_seen == 2 * len(PRODUCT) + len(qkv) + 12


def test_a_run_over_shared_memory_is_captured_whole() -> None:
    model, prompt = tiny_model("llama"), random_tokens(9)
    capture = Capture()
    with LLM(
        str(model.directory),
        protection="open",
        compute=ComputeConfig(dtype="float32", threads=1),
        connect=capture.connect,
    ) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=3, ignore_eos=True))
        sent = sum(row.bytes_sent for row in llm.stats.calls.values())
        calls = llm.stats.rpc_calls
    hello, *rest = capture.messages
    assert isinstance(hello.message, Hello)
    assert len(rest) == calls
    assert capture.bytes_seen == sent + len(encode(hello.message))
    view = View(capture, open_checkpoint(str(model.directory)).config)
    assert view.calls == calls
    assert view.rows(("down", 1)).shape == (9 + 2, 96)
    assert view.rows(("lm_head", None)).shape == (3, 64)
