"""Ragged batches: every new token is in one chunk once, in the order of its sequence, at its own position."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.model.batch import Batch, Chunk
from tsqp.model.cache import Positions

SEQUENCES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=5)  # held, new


def batch_of(sequences: list[tuple[int, int]]) -> Batch[Positions]:
    caches = [Positions() for _ in sequences]
    for cache, (held, _) in zip(caches, sequences, strict=True):
        cache.advance(held)
    tokens = [[100 * index + row for row in range(new)] for index, (_, new) in enumerate(sequences)]
    return Batch(tokens, caches)


def rows_of(chunk: Chunk[Positions], caches: list[Positions]) -> list[tuple[int, int]]:
    """Sequence and position of each row of a chunk, as its parts say."""
    found: list[tuple[int, int]] = []
    for part in chunk.spans:
        assert part.first == len(found), "parts follow one another without a gap"
        index = next(number for number, cache in enumerate(caches) if cache is part.cache)
        found += [(index, position) for position in range(part.position, part.end)]
        assert part.slice == slice(part.first, part.first + part.rows)
    assert len(found) == chunk.rows
    return found


def all_rows(sequences: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(index, held + row) for index, (held, new) in enumerate(sequences) for row in range(new)]


@given(SEQUENCES, st.integers(1, 20))
def test_chunks_hold_every_row_once_and_in_order(sequences: list[tuple[int, int]], max_rows: int) -> None:
    batch = batch_of(sequences)
    chunks = list(batch.chunks(max_rows))
    found = [row for chunk in chunks for row in rows_of(chunk, list(batch.caches))]
    assert found == all_rows(sequences)
    assert all(0 < chunk.rows <= max_rows for chunk in chunks)
    assert all(chunk.rows == max_rows for chunk in chunks[:-1]), "only the last chunk may be short"
    assert [chunk.offset for chunk in chunks] == [sum(c.rows for c in chunks[:n]) for n in range(len(chunks))]
    assert batch.flat_tokens().tolist() == [token for tokens in batch.tokens for token in tokens]


@given(SEQUENCES, st.integers(1, 20), st.integers(1, 7))
def test_a_split_chunk_is_the_same_rows(sequences: list[tuple[int, int]], max_rows: int, parts: int) -> None:
    batch = batch_of(sequences)
    for chunk in batch.chunks(max_rows):
        split = chunk.split(parts)
        assert len(split) == min(parts, chunk.rows)
        assert max(part.rows for part in split) - min(part.rows for part in split) <= 1
        whole = rows_of(chunk, list(batch.caches))
        assert [row for part in split for row in rows_of(part, list(batch.caches))] == whole
        assert [part.offset for part in split] == [
            chunk.offset + sum(p.rows for p in split[:n]) for n in range(len(split))
        ]
        assert torch.cat([part.positions() for part in split]).tolist() == [position for _, position in whole]


@given(SEQUENCES, st.integers(1, 20), st.integers(1, 7))
def test_each_sequence_ends_in_one_row(sequences: list[tuple[int, int]], max_rows: int, parts: int) -> None:
    batch = batch_of(sequences)
    ends = []
    for chunk in batch.chunks(max_rows):
        for part in chunk.split(parts):
            rows = rows_of(part, list(batch.caches))
            ends += [rows[row] for row in part.wanted_rows()]
    assert ends == [(index, held + new - 1) for index, (held, new) in enumerate(sequences)]


@given(SEQUENCES)
def test_advancing_moves_every_cache_by_its_own_tokens(sequences: list[tuple[int, int]]) -> None:
    batch = batch_of(sequences)
    batch.advance()
    assert [cache.length for cache in batch.caches] == [held + new for held, new in sequences]


@given(SEQUENCES, st.lists(st.tuples(st.booleans(), st.integers(0, 25)), min_size=5, max_size=5), st.integers(1, 20))
def test_rows_are_of_the_kind_that_the_batch_says(
    sequences: list[tuple[int, int]], said: list[tuple[bool, int]], max_rows: int
) -> None:
    """A row from the first decode step on is one, alone in its part; logits are those of the sampled sequences.

    Or those of all rows, where they are wanted: here of every second sequence.
    """
    plain = batch_of(sequences)
    sampled, firsts = [wanted for wanted, _ in said[: len(sequences)]], [first for _, first in said[: len(sequences)]]
    whole = [index % 2 == 1 for index in range(len(sequences))]
    batch = Batch(plain.tokens, plain.caches, sampled=sampled, first_steps=firsts, whole=whole)
    found, ends = [], []
    for chunk in batch.chunks(max_rows):
        for part in chunk.split(2):
            rows = rows_of(part, list(batch.caches))
            found += rows
            ends += [rows[row] for row in part.wanted_rows()]
            for span in part.spans:
                index = next(number for number, cache in enumerate(batch.caches) if cache is span.cache)
                assert span.alone == (span.position >= firsts[index])
                assert span.rows == 1 or span.end <= firsts[index]
    assert found == all_rows(sequences)
    wanted_rows = []
    for index, (held, new) in enumerate(sequences):
        first = held if whole[index] else held + new - 1
        wanted_rows += [(index, row) for row in range(first, held + new) if whole[index] or sampled[index]]
    assert ends == wanted_rows
