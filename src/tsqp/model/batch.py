"""Ragged batches: the rows of several sequences, one after another, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import torch

from tsqp.model.cache import Positions

C = TypeVar("C", bound=Positions)


@dataclass(frozen=True)
class SequenceRows(Generic[C]):
    """Consecutive new positions of one sequence within the flat rows of a chunk.

    Rows ``first`` to ``first + rows`` of the chunk are positions ``position`` onwards; ``last`` tells that the
    sequence's final row of this pass is among them, and that its logits are wanted. ``step``: whether this is a row of
    a decode step; None where the batch does not say. ``whole``: the logits of all of these rows are wanted.
    ``adapter``: the name of the one that they have.
    """

    cache: C
    position: int
    first: int
    rows: int
    last: bool
    step: bool | None = None
    whole: bool = False
    adapter: str | None = None

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.position + self.rows

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.rows)

    @property
    def alone(self) -> bool:
        """Whether it is a decode step: as the batch says, or the only new position of its sequence in this pass.

        A row that a chunk or a micro-batch has cut off from others of its sequence is none.
        """
        if self.step is not None:
            return self.step
        return self.rows == 1 and self.last and self.position == self.cache.length


@dataclass(frozen=True)
class Chunk(Generic[C]):
    """A bounded number of flat rows that cross the layers together. ``offset`` is its first row in the batch."""

    offset: int
    spans: tuple[SequenceRows[C], ...]

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)

    @property
    def slice(self) -> slice:
        """Its rows in the batch."""
        return slice(self.offset, self.offset + self.rows)

    def split(self, parts: int) -> list[Chunk[C]]:
        """The same rows as ``parts`` chunks of about equal size, fewer when there are fewer rows."""
        parts = min(parts, self.rows)
        edges = [self.rows * part // parts for part in range(parts + 1)]
        return [self._between(first, end) for first, end in pairwise(edges)]

    def _between(self, first: int, end: int) -> Chunk[C]:
        """The rows from ``first`` to ``end`` of this chunk."""
        spans = []
        for span in self.spans:
            low, high = max(first, span.first), min(end, span.first + span.rows)
            if low < high:
                last = span.last and high == span.first + span.rows
                position = span.position + low - span.first
                spans.append(replace(span, position=position, first=low - first, rows=high - low, last=last))
        return Chunk(self.offset + first, tuple(spans))

    def positions(self) -> torch.Tensor:
        """The position of every row, int64 (rows,)."""
        return torch.cat([torch.arange(span.position, span.end) for span in self.spans])

    def lengths(self, positions: torch.Tensor) -> torch.Tensor:
        """How long the text is whose rotary tables a row has, int64 (rows,), for rows at ``positions``.

        That of the prompt for its rows; from there on, each row ends the text that it is a row of.
        """
        begun = [torch.full((span.rows,), span.cache.begun) for span in self.spans]
        return torch.maximum(torch.cat(begun), positions + 1)

    def wanted_rows(self) -> list[int]:
        """The rows whose logits are wanted: those that end a sequence, and all of one that wants all."""
        rows: list[int] = []
        for span in self.spans:
            end = span.first + span.rows
            rows += range(span.first if span.whole else end - 1, end) if span.whole or span.last else ()
        return rows


@dataclass(frozen=True)
class Batch(Generic[C]):
    """The new tokens of several sequences, each with its cache. ``every_row`` asks for the logits of all rows.

    ``sampled``: of which sequences the logits of the last row are wanted; of all when not given. ``whole``: of which
    those of all rows are; of none when not given. ``first_steps``: the position of each sequence from which on its rows
    are decode steps, however many of them a pass has; when not given, a row that is alone of its sequence is one.
    ``call_by_call``: every call goes through the channel by itself, where somebody can see it. ``adapters``: the name
    of each sequence's adapter, None for none; no sequence has one when not given.
    """

    tokens: Sequence[Sequence[int]]
    caches: Sequence[C]
    every_row: bool = False
    sampled: Sequence[bool] | None = None
    first_steps: Sequence[int] | None = None
    whole: Sequence[bool] | None = None
    call_by_call: bool = False
    adapters: Sequence[str | None] | None = None

    def flat_tokens(self) -> torch.Tensor:
        """All token ids, int64 (T,)."""
        return torch.tensor([token for tokens in self.tokens for token in tokens], dtype=torch.int64)

    def advance(self) -> None:
        """Every layer of every cache now holds the new tokens."""
        for tokens, cache in zip(self.tokens, self.caches, strict=True):
            cache.advance(len(tokens))

    def chunks(self, max_rows: int) -> Iterator[Chunk[C]]:
        """The batch in chunks of at most ``max_rows`` rows, in causal order."""
        spans: list[SequenceRows[C]] = []
        offset = filled = 0
        for index, (tokens, cache) in enumerate(zip(self.tokens, self.caches, strict=True)):
            cache.begin(len(tokens))
            wanted = self.sampled is None or self.sampled[index]
            whole = self.whole is not None and self.whole[index]
            adapter = None if self.adapters is None else self.adapters[index]
            done = 0
            while done < len(tokens):
                rows, step = self._run(index, cache.length + done, min(len(tokens) - done, max_rows - filled))
                last = wanted and done + rows == len(tokens)
                spans.append(SequenceRows(cache, cache.length + done, filled, rows, last, step, whole, adapter))
                done += rows
                filled += rows
                if filled == max_rows:
                    yield Chunk(offset, tuple(spans))
                    offset, filled, spans = offset + filled, 0, []
        if spans:
            yield Chunk(offset, tuple(spans))

    def _run(self, index: int, position: int, rows: int) -> tuple[int, bool | None]:
        """How many of ``rows`` rows from ``position`` on are of one kind, and whether it is that of decode steps."""
        if self.first_steps is None:
            return rows, None
        before = self.first_steps[index] - position
        return (min(rows, before), False) if before > 0 else (1, True)
