"""Over shared memory the worker reads everything in the arena at any time: nothing but x' is ever found there."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tests.conftest import StartWorker
from tests.dialling import dialling
from tests.trusted.guard.runs import MODEL
from tsqp import LLM, SamplingParams
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.arith.expand import expand
from tsqp.arith.modulus import P
from tsqp.trusted.guard import kernels, pads, pool
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.slot import Slot

Array = np.ndarray[Any, np.dtype[Any]]


PAGE = 4096


class Watching:
    """See Channel. Looks at all of the arena that was ever in use, whenever something is sent or has arrived."""

    def __init__(self, channel: Any) -> None:
        self.seen: set[bytes] = set()  # each page with the one after it, so that no row is cut
        self._channel = channel
        self._end = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def reserve(self, size: int) -> memoryview:
        memory: memoryview = self._channel.reserve(size)
        self._note(memory)
        return memory

    def slot(self, size: int, reply_bytes: int) -> Slot:
        slot: Slot = self._channel.slot(size, reply_bytes)
        self._note(slot.tensor)
        return slot

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        self._look()
        self._channel.send(frames, reply_bytes)

    def send_from(self, slot: Slot, control: bytes) -> None:
        self._look()
        self._channel.send_from(slot, control)

    def receive(self, deadline_s: float) -> Frames:
        frames: Frames = self._channel.receive(deadline_s)
        for tensor in frames.tensors:
            self._note(tensor)
        self._look()
        return frames

    def _note(self, tensor: memoryview) -> None:
        region = self._channel._arena.region_of(tensor)
        self._end = max(self._end, region.offset + region.size)

    def _look(self) -> None:
        memory = self._channel._segment.memory
        self.seen |= {memory[place : place + 2 * PAGE] for place in range(0, self._end + 16 * PAGE, PAGE)}


def forms(row: Array) -> list[bytes]:
    """A row of integers in every form that it might lie there."""
    return [row.astype(item).tobytes() for item in (np.int16, np.int32, np.float32)] + [
        (row % P).astype("<u4").tobytes()
    ]


def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Every row of every secret of a call from now on, by name; and of what is sent."""
    found: dict[str, list[bytes]] = defaultdict(list)
    real_mask, real_unmask, real_supply = kernels.quantise_and_mask, kernels.verify_and_unmask, pads.PadBlock.supply

    def send(
        x: Array, limit: Any, projections: Array, masked: bool, r: Array, out: Array, scales: Array, *rest: Any
    ) -> None:
        real_mask(x, limit, projections, masked, r, out, scales, *rest)
        digits = np.clip(np.round(x / scales[:, None]), -limit, limit).astype(np.int64)
        found["xq"] += [form for row in digits for form in forms(row)]
        found["x"] += [row.tobytes() for row in x]
        found["check vectors"] += [row.tobytes() for row in projections]
        if len(scales) > 1:  # one float32 may be anywhere by chance
            found["scales"].append(scales.tobytes())
        found["sent"] += [row.tobytes() for row in out]

    def accept(reply: Array, check_vectors: Array, sums: Array, masked: bool, products: Array, *rest: Any) -> None:
        product = (reply.astype(np.int64) - (products.astype(np.int64) if masked else 0)) % P
        real_unmask(reply, check_vectors, sums, masked, products, *rest)
        found["check vectors"] += [row.tobytes() for row in check_vectors]
        found["product"] += [row.astype(np.uint32).tobytes() for row in product]

    def expand_and_record(stream: Any, out: Array) -> None:
        expand(stream, out)
        found["pads"] += [row.tobytes() for row in out]

    def supply(block: Any, products: Array) -> None:
        found["products of pads"] += [row.tobytes() for row in products]
        found["keys"].append(bytes(block._key))
        real_supply(block, products)

    for owner, name, with_record in (
        (kernels, "quantise_and_mask", send),
        (kernels, "verify_and_unmask", accept),
        (pads, "expand", expand_and_record),
        (pool, "expand", expand_and_record),
        (pads.PadBlock, "supply", supply),
    ):
        monkeypatch.setattr(owner, name, with_record)
    return found


@pytest.mark.parametrize("protection", ["masked", "verified"])
def test_the_arena_holds_no_secret(
    protection: ProtectionName, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, channels = record(monkeypatch), []

    def watch(channel: Channel) -> Any:
        channels.append(Watching(channel))
        return channels[-1]

    address = start_worker(MODEL, "shm", dtype="field")
    options = GuardConfig(pads_ahead=0) if protection == "masked" else None
    with LLM(MODEL, protection=protection, worker=address, guard=options, connect=dialling(watch)) as llm:
        found.clear()  # of compiling the loops, on rows of zeros
        llm.generate([[3, 4, 5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    (channel,) = channels
    arena = b"|".join(channel.seen)
    there = {name for name, rows in found.items() if any(row in arena for row in set(rows))}
    missing = [row for row in set(found["sent"]) if row not in arena]
    assert not missing  # this scan finds what is there
    if protection == "masked":
        assert {"pads", "products of pads", "keys", "xq", "scales", "product", "check vectors"} <= found.keys()
        assert there == {"sent"}
    else:
        assert there == {"sent", "xq", "product"}  # they are what crosses in this mode, and the scan finds them
