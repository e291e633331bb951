"""A link that is given up while it is made."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.families import tiny_model
from tsqp import GuardConfig, WorkerConfig
from tsqp.api.config import RunConfig
from tsqp.api.places import Dialled
from tsqp.api.plan import Plan
from tsqp.api.private_links import PrivateLinks
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint, stored_dtype
from tsqp.config.shard import Shard
from tsqp.errors import ChannelClosed
from tsqp.trusted.private import PrivateModel
from tsqp.trusted.stats import Stats

MODEL = str(tiny_model("llama").directory)
SHARDS = ["0..3/0..1of2", "0..3/1..2of2"]


class FakeChannel:
    address = "tcp://127.0.0.1:1"
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_check_vectors_for_another_tiling_are_not_made_once_it_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are read again for them: minutes, for a large model, in which nobody could close it."""
    plan = Plan.of(RunConfig(MODEL, "verified", WorkerConfig(), GuardConfig()), stored_dtype(MODEL))
    links = PrivateLinks(open_checkpoint(MODEL), plan, None, Stats())
    stop, channels, asked = threading.Event(), [FakeChannel(), FakeChannel()], list[bool]()
    renewed = PrivateModel.renewed

    def watched(model: PrivateModel, checkpoint: Any, stopped: Any, tiling: Any = None) -> PrivateModel:
        asked.append(stopped())
        return renewed(model, checkpoint, stopped, tiling)

    def dial(until: Until) -> Sequence[Dialled]:
        stop.set()
        workers: list[Any] = list(channels)
        return [Dialled(one, Shard.parse(shard)) for one, shard in zip(workers, SHARDS, strict=True)]

    monkeypatch.setattr(PrivateModel, "renewed", watched)
    with pytest.raises(ChannelClosed, match="the model was closed"):
        links.connect(dial, Until(None, stop.is_set))
    assert asked == [True]
    assert [channel.closed for channel in channels] == [1, 1]
    links.close()
