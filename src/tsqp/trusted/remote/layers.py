"""The ``layer`` partition: a decoder whose layers, hidden states and KV caches are all on the worker.

Token ids go out, logits come back. The calls of a pass do not wait for each other: the worker does them in order.
"""

from __future__ import annotations

import weakref

import torch

from tsqp.errors import InputError
from tsqp.model import vector_math
from tsqp.model.batch import Batch
from tsqp.model.cache import Positions
from tsqp.model.norms import soft_capped
from tsqp.model.pending import Steps
from tsqp.trusted.remote.session import PendingReply, WorkerSession
from tsqp.wire.messages import Begin, Finish, Layer, Place

MAX_PLACES = 64  # sequences of one pass; see the protocol
MAX_FORGET = 256


class RemoteCache(Positions):
    """The worker's cache of one sequence, by number."""

    def __init__(self, sequence: int) -> None:
        super().__init__()
        self.sequence = sequence

    def bytes_for(self, end: int) -> int:
        """Memory on this side: none. The worker bounds its own."""
        return 0


class LayerDecoder:
    """The forward pass as the worker's layers do it."""

    max_sequences = MAX_PLACES
    caches_on_worker = True

    def __init__(self, session: WorkerSession, *, max_rows: int) -> None:
        vector_math.settle()  # the soft cap of logits
        self.config = session.config
        self._session = session
        self._max_rows = max_rows
        self._sequences = 0
        self._forget: list[int] = []

    def new_cache(self) -> RemoteCache:
        """A sequence that is new to the worker. Once it is let go here, the worker is told with the next pass."""
        self._sequences += 1
        cache = RemoteCache(self._sequences)
        weakref.finalize(cache, self._forget.append, cache.sequence)
        return cache

    def forward(self, batch: Batch[RemoteCache]) -> Steps[torch.Tensor]:
        """Logits, float32: see ``Decoder.forward``. Raises ChannelError; the worker's caches are lost with it."""
        if len(batch.tokens) > MAX_PLACES:
            raise InputError(f"{len(batch.tokens)} prompts at once; at partition layer the most is {MAX_PLACES}")
        session, config, stats = self._session, self.config, self._session.stats
        begin = session.next_id()
        chunks = list(batch.chunks(self._max_rows))
        calls = [self._begin(begin, batch)]
        for chunk in range(len(chunks)):
            for layer in range(config.num_layers):
                call = Layer(session.next_id(), begin, layer, chunk)
                calls.append(session.start("layer", call, [], (0,)))
        every_row = batch.every_row or any(batch.whole or ())  # the worker is asked for the last rows, or for all
        rows = sum(len(tokens) for tokens in batch.tokens) if every_row else len(batch.tokens)
        finish = Finish(session.next_id(), begin, every_row)
        logits = session.start("lm_head", finish, [], (rows, config.vocab_size))
        for under_way in calls:  # noqa: UP028  (resumed with each result, which a list would not take)
            yield under_way
        result = soft_capped((yield logits).float(), config.logits_cap)
        if every_row and not batch.every_row:
            result = result[[chunk.offset + row for chunk in chunks for row in chunk.wanted_rows()]]
        elif batch.sampled is not None and not batch.every_row:
            result = result[[index for index, wanted in enumerate(batch.sampled) if wanted]]
        batch.advance()
        stats.chunks += len(chunks)
        stats.forward_passes += 1
        return result

    def _begin(self, begin: int, batch: Batch[RemoteCache]) -> PendingReply[torch.Tensor]:
        places = tuple(
            Place(cache.sequence, cache.length, len(tokens), cache.begun)
            for tokens, cache in zip(batch.tokens, batch.caches, strict=True)
        )
        forget = tuple(self._forget[:MAX_FORGET])
        del self._forget[: len(forget)]  # and no more: a cache may have gone meanwhile, and appended itself
        call = Begin(begin, places, self._max_rows, forget)
        return self._session.start("embedding", call, [batch.flat_tokens().to(torch.int32)], (0,))
