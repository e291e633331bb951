"""Over shared memory the worker reads everything in the arena at any time: nothing but x' is ever found there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import StartWorker
from tests.dialling import dialling
from tests.trusted.guard.runs import MODEL
from tests.trusted.guard.secret_bytes import record
from tsqp import LLM, SamplingParams
from tsqp.api.config import GuardConfig, ProtectionName
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
        # More rows than a compiled step has: ``record`` sees what goes through Python. For steps: test_step_view.py.
        llm.generate([list(range(3, 23))], SamplingParams(max_tokens=3, ignore_eos=True))
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
