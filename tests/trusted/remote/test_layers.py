"""What the trusted side keeps of a worker's caches at the ``layer`` partition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from tsqp.checkpoint import open_checkpoint
from tsqp.model.batch import Batch
from tsqp.trusted.remote.layers import LayerDecoder
from tsqp.trusted.remote.session import WorkerSession
from tsqp.wire.messages import Begin


class LateList(list[int]):
    """A list to which a cache that goes appends itself while the list is copied."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.append(99)
        return found


def test_a_cache_that_goes_while_others_are_told_is_told_with_the_next_pass() -> None:
    begun: list[Begin] = []
    session = SimpleNamespace(
        config=open_checkpoint("synthetic:tiny").config,
        start=lambda kind, call, tensors, shape: begun.append(call),
    )
    decoder = LayerDecoder(cast(WorkerSession, session), max_rows=8)
    batch = Batch([[1]], [decoder.new_cache()])
    decoder._forget = LateList([1, 2])
    decoder._begin(1, batch)
    decoder._forget = list(decoder._forget)
    decoder._begin(2, batch)
    assert [call.forget for call in begun] == [(1, 2), (99,)]
