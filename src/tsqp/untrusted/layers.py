"""Forward passes that stay on the worker: embedding, layers, KV caches and hidden states of one connection.

Everything is bounded and goes with the connection. Numbers for sequences and passes are the client's; nothing of
another connection can be named. ``LayerState`` checks what a client asks for; a ``LayerCompute`` does it, in the memory
of the host (``host_layers.py``) or of a device (``device_layers.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from tsqp.errors import ProtocolError
from tsqp.model.batch import Batch
from tsqp.model.cache import Positions
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.device_layers import DeviceLayers
from tsqp.untrusted.host_layers import HostLayers
from tsqp.wire.messages import Begin, Finish, Layer, Place

MAX_PASSES = 4
MAX_CACHE_BYTES = 8 * 2**30


class PassCompute(Protocol):
    """One forward pass under way: the hidden states of its rows, changed by every layer."""

    chunks: int

    def layer(self, layer: int, chunk: int) -> None:
        """Put one chunk through one layer."""

    def logits(self, *, every_row: bool) -> torch.Tensor:
        """Logits of all rows, or of those that end a sequence: (n, vocab_size)."""


class LayerCompute(Protocol):
    """Computes the passes of one connection, in caches that it makes."""

    def new_cache(self) -> Positions:
        """The cache of a sequence that is new here."""

    def release(self, cache: Positions) -> None:
        """A sequence is over."""

    def bytes_for(self, lengths: Iterable[int]) -> int:
        """The memory that caches of these lengths take, with the room that they have for more."""

    def begin(self, tokens: torch.Tensor, batch: Batch[Positions], max_rows: int) -> PassCompute:
        """Look up the embedding of int32 tokens (T,) on the host, in chunks of at most ``max_rows`` rows."""


@dataclass(frozen=True)
class _Pass:
    sequences: frozenset[int]
    batch: Batch[Positions]
    compute: PassCompute


class LayerState:
    """The state of one connection at the ``layer`` partition; none before its first pass."""

    def __init__(
        self, weights: ModelWeights, backend: Backend | None = None, *, max_cache_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        backend = backend or CpuBackend()
        self._weights = weights
        self._max_cache_bytes = max_cache_bytes
        self._caches: dict[int, Positions] = {}
        self._ends: dict[int, int] = {}  # positions of each, once its passes are over
        self._passes: dict[int, _Pass] = {}
        self._compute: LayerCompute
        if backend.captures:
            self._compute = DeviceLayers(weights, backend, max_cache_bytes)
        else:
            self._compute = HostLayers(weights)

    def begin(self, call: Begin, tokens: torch.Tensor) -> None:
        """Look up the embedding of int32 tokens (T,), which nobody else can change.

        Raises ProtocolError for what the model or the bounds forbid.
        """
        self._check_free({*call.forget, *(place.sequence for place in call.places)})
        for sequence in call.forget:
            if (cache := self._caches.pop(sequence, None)) is not None:
                del self._ends[sequence]
                self._compute.release(cache)
        if len(self._passes) >= MAX_PASSES:
            raise ProtocolError(f"{MAX_PASSES} passes are under way already")
        if len({place.sequence for place in call.places}) < len(call.places):
            raise ProtocolError("a sequence is in a pass twice")
        ends = {place.sequence: place.position + place.rows for place in call.places}
        self._check_room(ends)
        caches = {place.sequence: self._cache(place) for place in call.places}
        batch = Batch(tokens.split([place.rows for place in call.places]), list(caches.values()))
        try:
            compute = self._compute.begin(tokens, batch, call.max_rows)
        except Exception:
            for sequence in caches.keys() - self._caches.keys():
                self._compute.release(caches[sequence])
            raise
        self._passes[call.id] = _Pass(frozenset(caches), batch, compute)
        self._caches |= caches
        self._ends |= ends

    def layer(self, call: Layer) -> None:
        """One chunk through one layer. Raises ProtocolError."""
        under_way = self._pass(call.begin).compute
        if call.layer >= self._weights.config.num_layers or call.chunk >= under_way.chunks:
            raise ProtocolError(f"there is no layer {call.layer} or no chunk {call.chunk}")
        under_way.layer(call.layer, call.chunk)

    def finish(self, call: Finish) -> torch.Tensor:
        """Logits of the wanted rows, (n, vocab_size), without a cap; the pass ends. Raises ProtocolError."""
        under_way = self._pass(call.begin)
        del self._passes[call.begin]
        under_way.batch.advance()
        return under_way.compute.logits(every_row=call.every_row)

    def rows_of(self, call: Finish) -> int:
        """How many rows of logits ``finish`` will give. Raises ProtocolError."""
        batch = self._pass(call.begin).batch
        return sum(len(tokens) for tokens in batch.tokens) if call.every_row else len(batch.tokens)

    def _pass(self, begin: int) -> _Pass:
        under_way = self._passes.get(begin)
        if under_way is None:
            raise ProtocolError(f"no pass was begun by call {begin}")
        return under_way

    def _check_free(self, sequences: set[int]) -> None:
        """That no pass under way has them: its memory would be another's, or hold what the other stores."""
        for under_way in self._passes.values():
            if taken := sequences & under_way.sequences:
                raise ProtocolError(f"sequence {min(taken)} is in a pass that is under way")

    def _cache(self, place: Place) -> Positions:
        """The cache of a sequence, which must hold just the positions before those of ``place``."""
        sequence, position = place.sequence, place.position
        cache = self._caches.get(sequence)
        if cache is None:
            cache = self._compute.new_cache()
        if cache.length != position:
            raise ProtocolError(f"sequence {sequence} has {cache.length} positions here, not {position}")
        cache.begin(place.begun)
        return cache

    def _check_room(self, ends: dict[int, int]) -> None:
        """Before anything is allocated: for sequences with so many positions, beside all others."""
        if max(ends.values()) > self._weights.config.max_positions:
            raise ProtocolError(f"a sequence is longer than the context of {self._weights.config.max_positions}")
        needed = self._compute.bytes_for((self._ends | ends).values())
        if needed > self._max_cache_bytes:
            raise ProtocolError(f"the KV caches need {needed} bytes; a connection may have {self._max_cache_bytes}")
