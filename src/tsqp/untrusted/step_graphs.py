"""Decode steps on a device as graphs: one launch for each layer, whatever sequences, positions and caches it is about.

A graph is bound to memory. So rows and pages are rounded up to powers of two, and each such pair has memory that stays,
filled by one copy when a pass begins. Rows that no sequence has write to page 0 and see nothing but it; nobody reads
what they give.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from tsqp.model.batch import Chunk
from tsqp.model.decoder_layers import ChunkWork, DecoderLayers
from tsqp.model.pending import run
from tsqp.model.rotary import Rotary
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.graphs import bucket
from tsqp.untrusted.host_layers import final_logits
from tsqp.untrusted.paged_rows import NO_SPANS, PagedKernels, StepAttention, Visible
from tsqp.untrusted.pages import PagedSequence, Pages, pages_for
from tsqp.wire.payload import tensor_bytes

TOKEN, POSITION, SLOT, TABLE = range(4)  # columns of a row's numbers; the pages of its sequence follow

MOST_ROWS = 64  # sequences of a pass
MOST_STEPS = 24  # of one connection: pairs of rows and pages
GATHERED_BYTES = 256 << 20  # of keys and values that one layer may copy together: long texts beside short ones are many


class StepGraphs:
    """The graphs of one connection."""

    def __init__(
        self, weights: ModelWeights, backend: Backend, rotary: Rotary, pages: Pages, block: DecoderLayers
    ) -> None:
        self._weights, self._backend, self._rotary, self._pages, self._block = weights, backend, rotary, pages, block
        self._steps: dict[tuple[int, int], StepRows] = {}  # the longest unused first

    def begin(self, tokens: torch.Tensor, chunk: Chunk[PagedSequence]) -> StepRows | None:
        """The memory of a pass that has begun there; None for one that is not of few rows of as many sequences."""
        if chunk.rows > MOST_ROWS or any(span.rows > 1 for span in chunk.spans):
            return None
        rows, pages = bucket(chunk.rows), bucket(max(pages_for(span.end) for span in chunk.spans))
        if rows * pages * self._pages.page_bytes > GATHERED_BYTES * self._weights.config.num_layers:
            return None
        steps = self._of(rows, pages)
        if steps is not None:
            steps.begin(tokens, chunk)
        return steps

    def _of(self, rows: int, pages: int) -> StepRows | None:
        """Memory that no pass has."""
        steps = self._steps.pop((rows, pages), None)
        if steps is not None and not steps.good:
            steps = None  # its graphs write where the caches were
        if steps is None:
            idle = [key for key, one in self._steps.items() if not one.taken]
            if len(self._steps) >= MOST_STEPS and idle:
                del self._steps[idle[0]]
            memory = StepMemory(self._weights, self._rotary, self._pages, self._block, rows, pages)
            steps = StepRows(self._backend, memory)
        self._steps[rows, pages] = steps
        return None if steps.taken else steps


class StepRows:
    """Memory for one pass after another of ``rows`` rows at most, each over ``table_pages`` pages at most, and graphs.

    ``taken``: whether a pass is under way there.
    """

    def __init__(self, backend: Backend, memory: StepMemory) -> None:
        self._backend, self._memory = backend, memory
        self._generation = memory.pages.generation
        self.taken = False
        self._begin = backend.captured(memory.look_up)
        layers = range(len(memory.block.norms.layers))
        self._layers = [backend.captured(partial(memory.through, layer)) for layer in layers]
        self._head = backend.captured(memory.final)

    @property
    def good(self) -> bool:
        """Whether the caches are still where the graphs have them."""
        return self._generation == self._memory.pages.generation

    @property
    def hidden(self) -> torch.Tensor:
        """Of all rows, (rows, hidden_size)."""
        return self._memory.hidden

    def begin(self, tokens: torch.Tensor, chunk: Chunk[PagedSequence]) -> None:
        """Begin a pass: int32 tokens (T,) on the host, and a row of the chunk for each."""
        self.taken = True
        memory, rows = self._memory, len(tokens)
        positions = chunk.positions()
        numbers = torch.zeros(memory.numbers.shape, dtype=torch.int32)
        numbers[:rows, TOKEN] = tokens
        numbers[:rows, POSITION] = positions
        for row, span in enumerate(chunk.spans):
            numbers[row, SLOT] = span.cache.slot(span.position)
            table = span.cache.pages[: pages_for(span.end)]
            numbers[row, TABLE : TABLE + len(table)] = torch.tensor(table)
        self._backend.stage_into(tensor_bytes(numbers), memory.numbers)
        following = memory.rotary.following(chunk.lengths(positions))
        for place, angles in zip(memory.following, following, strict=True):
            self._backend.stage_into(tensor_bytes(F.pad(angles, (0, 0, 0, len(place) - rows))), place)
        self._begin()

    def layer(self, layer: int) -> None:
        """Put all rows through one layer."""
        self._layers[layer]()

    def logits(self) -> torch.Tensor:
        """Of all rows, (rows, vocab_size): good until the next pass."""
        self._head()
        return self._memory.logits

    def end(self) -> None:
        """The pass is over."""
        self.taken = False


class StepMemory:
    """Device memory that stays, and the work on it that is captured. All of it is zero at first.

    So what is done before the first pass, as a graph is made by doing its work, writes to page 0.
    """

    def __init__(
        self, weights: ModelWeights, rotary: Rotary, pages: Pages, block: DecoderLayers, rows: int, table_pages: int
    ) -> None:
        config, device, dtype = weights.config, weights.device, weights.dtype
        self._weights, self.rotary, self.pages = weights, rotary, pages
        self.numbers = torch.zeros(rows, TABLE + table_pages, dtype=torch.int32, device=device)
        half = (rows, config.head_dim // 2)
        self.following = [torch.zeros(half, device=device) for rope in config.ropes if rope.follows_length]
        self._slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        self.logits = torch.zeros(rows, config.vocab_size, dtype=dtype, device=device)
        cos = torch.zeros(len(config.ropes), rows, config.head_dim, dtype=dtype, device=device)
        sin = torch.zeros_like(cos)
        q = torch.zeros(config.num_heads, rows, config.head_dim, dtype=dtype, device=device)
        windows = dict.fromkeys(config.windows)
        self._visible = {window: Visible.empty(rows, table_pages, window, device) for window in windows}
        attention = StepAttention(pages, self._visible, config.windows, config.score_scale, config.score_cap)
        self.block = replace(block, kernels=PagedKernels(block.kernels, pages, self._slots))
        self._work = ChunkWork(cos, sin, list(zip(cos, sin, strict=True)), q, attention)

    def look_up(self) -> None:
        """The embedding of the tokens, and what the layers share."""
        tokens, positions, slots = self.numbers[:, :TABLE].unbind(1)
        self.hidden.copy_(self.block.embedded(F.embedding(tokens, self._weights.embedding)))
        self._slots.copy_(slots)
        cos, sin = self.rotary.of(positions, self.following)
        self._work.cos.copy_(cos)
        self._work.sin.copy_(sin)
        for window, visible in self._visible.items():
            visible.fill(self.numbers[:, TABLE:], positions.long(), window)

    def through(self, layer: int) -> None:
        """All rows through one layer."""
        run(self.block.steps([layer], self.hidden, NO_SPANS, self._work))

    def final(self) -> None:
        """Logits of all rows."""
        self.logits.copy_(final_logits(self.block, self._weights, self.hidden))
