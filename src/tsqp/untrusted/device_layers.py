"""Forward passes on a device; see ``docs/gpu.md`` §4.

All that the host knows of a pass, its tokens, positions and pages, crosses in one copy when the pass begins. From then
on nothing waits for the device before the logits. A pass of few rows, each of its own sequence, is one of graphs
(``step_graphs.py``); any other is launched operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F

from tsqp.model.batch import Batch, Chunk
from tsqp.model.cache import Positions
from tsqp.model.decoder_layers import ChunkWork, DecoderLayers
from tsqp.model.meter import Unmetered
from tsqp.model.operators import ChunkAttention
from tsqp.model.pending import run
from tsqp.model.rotary import Rotary
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.device_kernels import DeviceKernels
from tsqp.untrusted.host_layers import final_logits
from tsqp.untrusted.paged_rows import NO_SPANS, DeviceLinears, PagedKernels, PagedSpan, SpanAttention
from tsqp.untrusted.pages import PagedSequence, Pages, pages_for
from tsqp.untrusted.step_graphs import StepGraphs, StepRows
from tsqp.wire.payload import tensor_bytes


class BroughtAlong:
    """See Attention: each chunk brings its own."""

    def of(self, chunk: object) -> ChunkAttention:
        """See Attention."""
        raise NotImplementedError


class DeviceLayers:
    """See LayerCompute."""

    def __init__(self, weights: ModelWeights, backend: Backend, max_cache_bytes: int) -> None:
        config, dtype, device = weights.config, weights.dtype, weights.device
        self.weights, self.backend = weights, backend
        self.rotary = Rotary(config, dtype, device)
        self.pages = Pages(config, dtype, device, max_cache_bytes)
        self.block = DecoderLayers(
            config,
            weights.norms,
            DeviceLinears(weights.groups),
            BroughtAlong(),
            weights.kernels or DeviceKernels(),
            Unmetered(),
        )
        self.graphs = StepGraphs(weights, backend, self.rotary, self.pages, self.block)

    def new_cache(self) -> PagedSequence:
        """See LayerCompute."""
        return PagedSequence()

    def release(self, cache: Positions) -> None:
        """See LayerCompute."""
        self.pages.release(cast(PagedSequence, cache))

    def bytes_for(self, lengths: Iterable[int]) -> int:
        """See LayerCompute. Pages are whole."""
        return sum(map(pages_for, lengths)) * self.pages.page_bytes

    def begin(self, tokens: torch.Tensor, batch: Batch[Positions], max_rows: int) -> DevicePass:
        """See LayerCompute."""
        own = cast("Batch[PagedSequence]", batch)
        chunks = list(own.chunks(max_rows))
        for cache, new in zip(own.caches, own.tokens, strict=True):
            self.pages.reserve(cache, cache.length + len(new))
        return DevicePass(self, tokens, chunks)


@dataclass(frozen=True)
class _ChunkRows:
    """One chunk's block, with kernels that know where its keys go, and what its layers share."""

    block: DecoderLayers
    work: ChunkWork


class DevicePass:
    """See PassCompute: hidden states (T, hidden_size) on the device, those of graphs where there are some for it."""

    def __init__(self, layers: DeviceLayers, tokens: torch.Tensor, chunks: Sequence[Chunk[PagedSequence]]) -> None:
        self._layers, self._sequences = layers, chunks
        self.chunks = len(chunks)
        self._rows: list[_ChunkRows] | None = None
        self._steps: StepRows | None = layers.graphs.begin(tokens, chunks[0]) if len(chunks) == 1 else None
        if self._steps is not None:
            self._hidden = self._steps.hidden[: len(tokens)]
            return
        staged = self._staged(tokens)
        self._hidden = layers.block.embedded(F.embedding(staged, layers.weights.embedding))
        self._rows = self._laid_out()

    def layer(self, layer: int, chunk: int) -> None:
        """See PassCompute."""
        if self._steps is not None and self._steps.good:
            self._steps.layer(layer)
            return
        if self._rows is None:  # the caches have moved since the graphs began: the hidden states are where they were
            self._rows = self._laid_out()
        rows, own = self._rows[chunk], self._sequences[chunk]
        run(rows.block.steps([layer], self._hidden[own.slice], NO_SPANS, rows.work))

    def logits(self, *, every_row: bool) -> torch.Tensor:
        """See PassCompute."""
        layers, hidden = self._layers, self._hidden
        if self._steps is not None:
            self._steps.end()  # what comes next there is queued after this
            if self._steps.good:
                return self._steps.logits()[: len(hidden)].clone()  # each row ends its sequence
        if not every_row:
            last = [chunk.offset + row for chunk in self._sequences for row in chunk.wanted_rows()]
            hidden = hidden.index_select(0, self._staged(torch.tensor(last, dtype=torch.int32)))
        return final_logits(layers.block, layers.weights, hidden)

    def _laid_out(self) -> list[_ChunkRows]:
        """What the layers of each chunk share."""
        return [self._chunk_rows(chunk) for chunk in self._sequences]

    def _chunk_rows(self, chunk: Chunk[PagedSequence]) -> _ChunkRows:
        layers, config = self._layers, self._layers.weights.config
        positions, rows = chunk.positions(), chunk.rows
        slots = [span.cache.slots(span.position, span.end) for span in chunk.spans]
        tables = [span.cache.pages[: pages_for(span.end)] for span in chunk.spans]
        numbers = torch.cat((positions, *slots, *map(torch.tensor, tables)))
        staged = self._staged(numbers.to(torch.int32))
        index = staged[2 * rows :].split([len(table) for table in tables])
        following = [self._floats(angles) for angles in layers.rotary.following(chunk.lengths(positions))]
        cos, sin = layers.rotary.of(staged[:rows], following)
        spans = [PagedSpan.of(span, own) for span, own in zip(chunk.spans, index, strict=True)]
        attention = SpanAttention(layers.pages, spans, config.windows, config.score_scale, config.score_cap)
        kernels = PagedKernels(layers.block.kernels, layers.pages, staged[rows : 2 * rows].long())
        q = cos.new_empty(config.num_heads, rows, config.head_dim)
        work = ChunkWork(cos, sin, list(zip(cos, sin, strict=True)), q, attention)
        return _ChunkRows(replace(layers.block, kernels=kernels), work)

    def _staged(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._layers.backend.stage_in(tensor_bytes(numbers), torch.int32, tuple(numbers.shape))

    def _floats(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._layers.backend.stage_in(tensor_bytes(numbers.contiguous()), torch.float32, tuple(numbers.shape))
