"""Ragged batches: the rows of several sequences, one after another, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tsqp.trusted.cache import KVCache


@dataclass(frozen=True)
class Span:
    """Consecutive new positions of one sequence within the flat rows of a chunk.

    Rows ``first`` to ``first + rows`` of the chunk are positions ``position`` onwards; ``last`` tells that the
    sequence's final row of this pass is among them.
    """

    cache: KVCache
    position: int
    first: int
    rows: int
    last: bool

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.position + self.rows

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.rows)


@dataclass(frozen=True)
class Chunk:
    """A bounded number of flat rows that cross the layers together. ``offset`` is its first row in the batch."""

    offset: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)

    def positions(self) -> torch.Tensor:
        """The position of every row, int64 (rows,)."""
        return torch.cat([torch.arange(span.position, span.end) for span in self.spans])

    def last_rows(self) -> list[int]:
        """The rows that end a sequence."""
        return [span.first + span.rows - 1 for span in self.spans if span.last]


@dataclass(frozen=True)
class Batch:
    """The new tokens of several sequences, each with its cache. ``every_row`` asks for the logits of all rows."""

    tokens: Sequence[Sequence[int]]
    caches: Sequence[KVCache]
    every_row: bool = False

    def flat_tokens(self) -> torch.Tensor:
        """All token ids, int64 (T,)."""
        return torch.tensor([token for tokens in self.tokens for token in tokens], dtype=torch.int64)

    def chunks(self, max_rows: int) -> Iterator[Chunk]:
        """The batch in chunks of at most ``max_rows`` rows, in causal order."""
        spans: list[Span] = []
        offset = filled = 0
        for tokens, cache in zip(self.tokens, self.caches, strict=True):
            done = 0
            while done < len(tokens):
                rows = min(len(tokens) - done, max_rows - filled)
                last = done + rows == len(tokens)
                spans.append(Span(cache, cache.length + done, filled, rows, last))
                done += rows
                filled += rows
                if filled == max_rows:
                    yield Chunk(offset, tuple(spans))
                    offset, filled, spans = offset + filled, 0, []
        if spans:
            yield Chunk(offset, tuple(spans))
