"""Attention in blocks: near a float64 reference, and the same bits whatever crosses the layers together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.arith.quantise import quantise_block
from tsqp.arith.row_threads import RowThreads
from tsqp.checkpoint import open_checkpoint
from tsqp.config.dtype import INT8_HEAD_DIMS
from tsqp.model import block_attention
from tsqp.model.attention import causal_mask
from tsqp.model.batch import Batch
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import KVCache, query_dtype
from tsqp.model.compiled_attention import BLOCK_KEYS, BLOCK_QUERIES, PART_KEYS
from tsqp.model.meter import Unmetered
from tsqp.model.pending import run

SHAPES = [(4, 2, 16), (3, 1, 64), (2, 2, 8), (5, 1, 72)]
DTYPES = [torch.bfloat16, torch.float32, torch.int8]
# Weights are rounded to what the cache holds. A score of some tens is right to 2^-20, and so is its exponential. With
# int8 queries and weights have 16 bits.
TOLERANCES = {torch.bfloat16: 6e-3, torch.float32: 2e-5, torch.int8: 1e-3}
EDGES = [1, 2, 63, 64, 65, BLOCK_QUERIES - 1, BLOCK_QUERIES, BLOCK_QUERIES + 1, 300, BLOCK_KEYS - 1, BLOCK_KEYS + 1]
LENGTHS = st.sampled_from(EDGES) | st.integers(1, 700)
CAPS = st.sampled_from([None, None, 1.5])
WINDOWS = st.sampled_from([None, None, 1, 7, 100, 600])


@dataclass
class Rows:
    """Queries (heads, n, d), keys and values (kv_heads, n, d) of one sequence, in the dtype of its cache.

    Of int8 queries are float32, and keys and values have scales (kv_heads, n).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scales: tuple[torch.Tensor, ...] = ()


def sequence(length: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Rows:
    heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, length, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads))
    return kept(q * 2, k, v, dtype)


def kept(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> Rows:
    """What a cache of ``dtype`` holds of float32 keys and values, and the queries for it."""
    if dtype != torch.int8:
        return Rows(q.to(dtype), k.to(dtype), v.to(dtype))
    keys, values = (quantise_block(x.flatten(0, 1)) for x in (k, v))
    scales = tuple(one.scales.view(k.shape[:2]) for one in (keys, values))
    return Rows(q, keys.values.view(k.shape), values.values.view(k.shape), scales)


def reference(one: Rows, window: int | None, cap: float | None = None) -> torch.Tensor:
    """Softmax(Q·Kᵀ/√d + mask)·V in float64, scores softly capped: (n, heads, head_dim)."""
    q, k, v = one.q.double(), one.k.double(), one.v.double()
    if one.scales:
        k, v = (t * scales.double().unsqueeze(2) for t, scales in zip((k, v), one.scales, strict=True))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    length = q.shape[1]
    scores.masked_fill_(~causal_mask(0, length, 0, length, window), float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(0, 1)


@contextmanager
def threads(count: int, attention: BlockAttention) -> Iterator[None]:
    """So many threads share the work, however little that is."""
    before, least = torch.get_num_threads(), block_attention.SPLIT_PAIRS
    torch.set_num_threads(count)
    block_attention.SPLIT_PAIRS = 0
    attention._threads = RowThreads()
    try:
        yield
    finally:
        block_attention.SPLIT_PAIRS = least
        torch.set_num_threads(before)


def outputs(
    sequences: Sequence[Rows],
    passes: Sequence[Sequence[int]],
    window: int | None,
    *,
    max_rows: int = 10_000,
    parts: int = 1,
    count: int = 1,
    out_dtype: torch.dtype = torch.float32,
    first_steps: Sequence[int] | None = None,
    cap: float | None = None,
) -> list[torch.Tensor]:
    """Attention of every row, (n, heads, d) for each sequence.

    ``passes`` has the new rows of each sequence in each forward pass, 0 for one that does not take part.
    ``first_steps``: see Batch.
    """
    heads, _, head_dim = sequences[0].q.shape
    dtype = sequences[0].k.dtype
    config = replace(
        open_checkpoint("synthetic:tiny").config,
        num_heads=heads,
        num_kv_heads=len(sequences[0].k),
        head_dim=head_dim,
        windows=(window,),
        num_layers=1,
    )
    attention = BlockAttention(config.windows, Unmetered(), cap=cap)
    caches = [KVCache(config, dtype) for _ in sequences]
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    with threads(count, attention):
        for rows in passes:
            present = [index for index, n in enumerate(rows) if n]
            firsts = None if first_steps is None else [first_steps[index] for index in present]
            batch = Batch(
                [[0] * rows[index] for index in present], [caches[index] for index in present], first_steps=firsts
            )
            for chunk in batch.chunks(max_rows):
                for part in chunk.split(parts):
                    q = torch.empty(heads, part.rows, head_dim, dtype=query_dtype(dtype))
                    for span in part.spans:  # all keys before any attention
                        one = sequences[next(i for i in present if caches[i] is span.cache)]
                        at = slice(span.position, span.end)
                        held = span.cache.reserve(0, span.end) + (span.cache.scales(0) if one.scales else ())
                        for tensor, new in zip(held, (one.k, one.v, *one.scales), strict=True):
                            tensor[:, at] = new[:, at]
                            # What was not written is not read.
                            tensor[:, span.end :] = float("nan") if tensor.is_floating_point() else 127
                        q[:, span.slice] = one.q[:, at]
                    out = torch.empty(part.rows, heads * head_dim, dtype=out_dtype)
                    run(attention.of(part).steps(0, q, out))
                    mixed = out.view(part.rows, heads, head_dim)
                    for span in part.spans:
                        found[next(i for i in present if caches[i] is span.cache)].append(mixed[span.slice])
            batch.advance()
    return [torch.cat(rows) for rows in found]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(
    length=LENGTHS,
    steps=st.integers(0, 3),
    window=WINDOWS,
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 99),
    cap=CAPS,
)
def test_prefill_and_decode_are_the_formula(
    dtype: torch.dtype,
    length: int,
    steps: int,
    window: int | None,
    shape: tuple[int, int, int],
    seed: int,
    cap: float | None,
) -> None:
    one = sequence(length + steps, shape, dtype, seed)
    (ours,) = outputs([one], [(length,), *[(1,)] * steps], window, cap=cap)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours.double(), reference(one, window, cap), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize("length", [PART_KEYS - 1, PART_KEYS, PART_KEYS + 1, 2 * PART_KEYS + 77])
def test_a_decode_step_over_several_parts_is_the_formula(dtype: torch.dtype, window: int | None, length: int) -> None:
    one = sequence(length, (4, 2, 16), dtype, 1)
    (ours,) = outputs([one], [(length - 1,), (1,)], window)
    torch.testing.assert_close(ours[-1].double(), reference(one, window)[-1], rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), shape=st.sampled_from(SHAPES), length=LENGTHS, steps=st.integers(1, 40))
def test_rows_of_an_answer_are_decode_steps_however_many_a_pass_has(
    dtype: torch.dtype, data: st.DataObject, shape: tuple[int, int, int], length: int, steps: int
) -> None:
    """A prompt in parts, one of them a single row, and an answer computed again in one pass: the same bits."""
    one = sequence(length + steps, shape, dtype, 3)
    (expected,) = outputs([one], [(length,), *[(1,)] * steps], None)
    edges = sorted(data.draw(st.sets(st.integers(1, length + steps - 1), max_size=4), label="edges"))
    passes = [(end - start,) for start, end in pairwise([0, *edges, length + steps])]
    max_rows, parts = data.draw(st.sampled_from([(10_000, 1), (50, 1), (10_000, 3)]), label="chunks")
    (ours,) = outputs([one], passes, None, max_rows=max_rows, parts=parts, first_steps=[length])
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), window=WINDOWS, shape=st.sampled_from(SHAPES), seed=st.integers(0, 99), cap=CAPS)
def test_a_sequence_has_the_same_bits_alone_and_in_any_company(
    dtype: torch.dtype,
    data: st.DataObject,
    window: int | None,
    shape: tuple[int, int, int],
    seed: int,
    cap: float | None,
) -> None:
    """Any batch, any chunk size, any number of micro-batches, one to three threads; a prompt, then decode steps."""
    lengths = data.draw(st.lists(LENGTHS, min_size=1, max_size=4), "lengths")
    steps = data.draw(st.integers(0, 3), "steps")
    sequences = [sequence(n + steps, shape, dtype, seed + i) for i, n in enumerate(lengths)]
    alone = [
        outputs([one], [(n,), *[(1,)] * steps], window, cap=cap)[0] for one, n in zip(sequences, lengths, strict=True)
    ]
    together = outputs(
        sequences,
        [lengths, *[[1] * len(lengths)] * steps],
        window,
        max_rows=data.draw(st.sampled_from([1, 3, 64, 100, 128, 129, 10_000]), "max_rows"),
        parts=data.draw(st.integers(1, 3), "parts"),
        count=data.draw(st.sampled_from([1, 2, 3]), "threads"),
        cap=cap,
    )
    for ours, other in zip(alone, together, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(
    edges=st.lists(st.integers(2, 300), min_size=1, max_size=4),
    window=WINDOWS,
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 99),
)
def test_a_prompt_may_come_in_several_passes(
    dtype: torch.dtype, edges: list[int], window: int | None, shape: tuple[int, int, int], seed: int
) -> None:
    """As where its beginning is in a cache already. A pass of one row alone is a decode step, which sums otherwise."""
    one = sequence(sum(edges), shape, dtype, seed)
    (whole,) = outputs([one], [(sum(edges),)], window)
    (pieces,) = outputs([one], [(n,) for n in edges], window)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefill_and_a_step_may_share_a_chunk(dtype: torch.dtype) -> None:
    old, new = sequence(201, (4, 2, 16), dtype, 1), sequence(150, (4, 2, 16), dtype, 2)
    mixed = outputs([old, new], [(200, 0), (1, 150)], None)
    assert torch.equal(mixed[0], outputs([old], [(200,), (1,)], None)[0])
    assert torch.equal(mixed[1], outputs([new], [(150,)], None)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_bfloat16_results_are_those_of_float32_rounded(dtype: torch.dtype, count: int) -> None:
    """As `open` and `local` have them: prefill and steps, short and over several parts, on one thread and on two."""
    sequences = [sequence(n + 2, (4, 2, 16), dtype, n) for n in (5, 150, PART_KEYS + 1)]
    passes = [(5, 150, PART_KEYS + 1), (1, 1, 1), (1, 1, 1)]
    wide = outputs(sequences, passes, None)
    narrow = outputs(sequences, passes, None, count=count, out_dtype=torch.bfloat16)
    for one, other in zip(wide, narrow, strict=True):
        assert torch.equal(one.bfloat16(), other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e6, 1e10, 1e20])
def test_scores_may_be_greater_than_any_exponent(dtype: torch.dtype, factor: float) -> None:
    """The greatest score is rounded where the exponents are not: for scores of 2^32 the difference may be 256."""
    one = sequence(150, (5, 1, 72), dtype, 1)  # its scale is no power of two
    one.q *= factor
    (ours,) = outputs([one], [(140,), *[(1,)] * 10], None)
    torch.testing.assert_close(ours.double(), reference(one, None), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_the_greatest_sums_of_integers() -> None:
    """Keys, values and queries that all are the greatest integer, over as many columns and keys as are added up."""
    heads, length, head_dim = 1, BLOCK_KEYS, INT8_HEAD_DIMS[-1]
    q, k, v = torch.full((3, heads, length, head_dim), -0.5)
    one = kept(q, k, v, torch.int8)
    assert (one.k == -127).all()
    (ours,) = outputs([one], [(length - 1,), (1,)], None)
    torch.testing.assert_close(ours.double(), reference(one, None), rtol=2**-14, atol=0)
    (whole,) = outputs([one], [(length,)], None)
    torch.testing.assert_close(whole.double(), reference(one, None), rtol=2**-14, atol=0)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])  # powers of two, which round nothing
def test_scales_may_be_small_and_large(scale: float) -> None:
    one = sequence(300, (4, 2, 16), torch.int8, 1)
    other = Rows(one.q / scale, one.k, one.v, (one.scales[0] * scale, one.scales[1] * scale))
    (ours,), (scaled,) = outputs([one], [(299,), (1,)], None), outputs([other], [(299,), (1,)], None)
    assert torch.equal(scaled / scale, ours)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("nan")])
def test_a_scale_that_is_not_finite_shows_in_every_row_that_sees_it(which: int, bad: float, cap: float | None) -> None:
    """Other rows are as they were. So the guard, which refuses such rows, is never handed numbers in their place."""
    one = sequence(602, (4, 2, 16), torch.int8, 1)
    passes = [(600,), (1,), (1,)]
    (before,) = outputs([one], passes, None, cap=cap)
    one.scales[which][0, 300] = bad
    one.k[0, 300] = one.v[0, 300] = 0  # as the quantiser leaves them
    (after,) = outputs([one], passes, None, cap=cap)
    assert not after[300:, :2].isfinite().any()
    assert torch.equal(after[:300], before[:300])
    assert torch.equal(after[:, 2:], before[:, 2:]), "other heads"


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "out"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("int8", "float32")])
def test_no_call_waits_for_a_compiler(kept: str, out: str) -> None:
    """In a process of its own: in this one every loop has been compiled."""
    code = f"""
import tests.cached_loops
import torch
from tsqp.checkpoint import open_checkpoint
from tsqp.model import compiled_attention, int8_attention
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import KVCache, query_dtype
from tsqp.model.meter import Unmetered
from tsqp.model.pending import run
modules = (compiled_attention, int8_attention)
loops = [loop for module in modules for loop in vars(module).values() if hasattr(loop, "signatures")]
config = open_checkpoint("synthetic:tiny").config
attention, cache = BlockAttention(config.windows, Unmetered()), KVCache(config, torch.{kept})
attention.compile(torch.{kept}, torch.{out})
before = [loop.signatures for loop in loops]
for rows in (39, 1):
    cache.reserve(0, cache.length + rows)
    q = torch.zeros(config.num_heads, rows, config.head_dim, dtype=query_dtype(torch.{kept}))
    spans = [SequenceRows(cache, cache.length, 0, rows, True)]
    run(attention.of(Chunk(0, tuple(spans))).steps(0, q, torch.empty(rows, config.q_size, dtype=torch.{out})))
    cache.advance(rows)
print(any(before), [loop.signatures for loop in loops] == before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "True True\n", run.stderr
