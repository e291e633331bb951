"""Forward passes that stay on the worker: embedding, layers, KV caches and hidden states of one connection.

Everything is bounded and goes with the connection. Numbers for sequences and passes are the client's; nothing of
another connection can be named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tsqp.errors import ProtocolError
from tsqp.model.batch import Batch, Chunk
from tsqp.model.cache import KVCache
from tsqp.model.decoder_layers import ChunkWork, DecoderLayers
from tsqp.model.kernels import pick_kernels
from tsqp.model.local import LocalLinears, pick_attention
from tsqp.model.meter import Unmetered
from tsqp.model.pending import run
from tsqp.model.rotary import Rotary
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.wire.messages import Begin, Finish, Layer, Place
from tsqp.wire.payload import tensor_bytes

MAX_PASSES = 4
MAX_CACHE_BYTES = 8 * 2**30


@dataclass
class _Pass:
    """One forward pass under way: its rows' hidden states (T, hidden_size), changed by every layer."""

    batch: Batch[KVCache]
    hidden: torch.Tensor
    chunks: list[Chunk[KVCache]]
    work: list[ChunkWork]


class LayerState:
    """The state of one connection at the ``layer`` partition; none before its first pass."""

    def __init__(
        self, weights: ModelWeights, backend: Backend | None = None, *, max_cache_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        config, dtype, device = weights.config, weights.dtype, weights.device
        self._weights = weights
        self._backend = backend or CpuBackend()
        self._max_cache_bytes = max_cache_bytes
        self._caches: dict[int, KVCache] = {}
        self._passes: dict[int, _Pass] = {}
        self._rotary = Rotary(config, dtype, device)
        self._block = DecoderLayers(
            config,
            weights.norms,
            LocalLinears(weights.groups, Unmetered()),
            pick_attention(config.windows, dtype, Unmetered(), device, scale=config.score_scale),
            pick_kernels(dtype, device, activation=config.activation),
            Unmetered(),
        )

    def begin(self, call: Begin, tokens: torch.Tensor) -> None:
        """Look up the embedding of int32 tokens (T,), which nobody else can change.

        Raises ProtocolError for what the model or the bounds forbid.
        """
        for sequence in call.forget:
            self._caches.pop(sequence, None)
        if len(self._passes) >= MAX_PASSES:
            raise ProtocolError(f"{MAX_PASSES} passes are under way already")
        if len({place.sequence for place in call.places}) < len(call.places):
            raise ProtocolError("a sequence is in a pass twice")
        self._check_room(call)
        caches = [self._cache(place) for place in call.places]
        batch = Batch(tokens.split([place.rows for place in call.places]), caches)
        chunks = list(batch.chunks(call.max_rows))
        work = [self._block.work(self._rotary, chunk) for chunk in chunks]
        hidden = F.embedding(self._staged(tokens), self._weights.embedding)
        self._passes[call.id] = _Pass(batch, self._block.embedded(hidden), chunks, work)

    def layer(self, call: Layer) -> None:
        """One chunk through one layer. Raises ProtocolError."""
        under_way = self._pass(call.begin)
        if call.layer >= self._weights.config.num_layers or call.chunk >= len(under_way.chunks):
            raise ProtocolError(f"there is no layer {call.layer} or no chunk {call.chunk}")
        chunk = under_way.chunks[call.chunk]
        hidden = under_way.hidden[chunk.slice]
        run(self._block.steps([call.layer], hidden, chunk, under_way.work[call.chunk]))

    def finish(self, call: Finish) -> torch.Tensor:
        """Logits of the wanted rows, (n, vocab_size); the pass ends. Raises ProtocolError."""
        under_way = self._pass(call.begin)
        del self._passes[call.begin]
        under_way.batch.advance()
        hidden = under_way.hidden
        if not call.every_row:
            last = [chunk.offset + row for chunk in under_way.chunks for row in chunk.wanted_rows()]
            hidden = hidden.index_select(0, self._staged(torch.tensor(last, dtype=torch.int32)))
        final = torch.empty_like(hidden)
        self._block.kernels.rms_norm(hidden, self._weights.norms.final, self._weights.config.rms_norm_eps, final)
        return self._weights.groups["lm_head", None].product(final)

    def rows_of(self, call: Finish) -> int:
        """How many rows of logits ``finish`` will give. Raises ProtocolError."""
        batch = self._pass(call.begin).batch
        return sum(len(tokens) for tokens in batch.tokens) if call.every_row else len(batch.tokens)

    def _staged(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers int32 (n,) of this process, on the device."""
        return self._backend.stage_in(tensor_bytes(numbers), torch.int32, tuple(numbers.shape))

    def _pass(self, begin: int) -> _Pass:
        under_way = self._passes.get(begin)
        if under_way is None:
            raise ProtocolError(f"no pass was begun by call {begin}")
        return under_way

    def _cache(self, place: Place) -> KVCache:
        """The cache of a sequence, which must hold just the positions before those of ``place``."""
        sequence, position = place.sequence, place.position
        cache = self._caches.get(sequence)
        if cache is None:
            cache = KVCache(self._weights.config, self._weights.dtype, self._weights.device)
        if cache.length != position:
            raise ProtocolError(f"sequence {sequence} has {cache.length} positions here, not {position}")
        cache.begin(place.begun)
        self._caches[sequence] = cache
        return cache

    def _check_room(self, call: Begin) -> None:
        """Before anything is allocated. A cache has up to twice the room that its positions need."""
        config = self._weights.config
        if any(place.position + place.rows > config.max_positions for place in call.places):
            raise ProtocolError(f"a sequence is longer than the context of {config.max_positions}")
        places = {place.sequence: place.position + place.rows for place in call.places}
        positions = sum((places | {n: c.length for n, c in self._caches.items() if n not in places}).values())
        needed = 2 * positions * 2 * config.num_layers * config.kv_size * self._weights.dtype.itemsize
        if needed > self._max_cache_bytes:
            raise ProtocolError(f"the KV caches need {needed} bytes; a connection may have {self._max_cache_bytes}")
