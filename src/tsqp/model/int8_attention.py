"""Loops of attention over 8-bit keys and values; see ``block_attention.py``, which says in which order they run.

They are the loops of ``compiled_attention.py`` in integers. A key is k·s, with k int8 and one float32 scale s for each
position and KV head, and so is a value. Products take integers alone:

- A query becomes integers of 16 bits with one scale, so that q·k is exact, whatever the order of its terms. The scales
  of the query and of the key are multiplied with the score.
- A weight is the exponential of the score times the scale of the value. The weights of a query over the keys of one
  block become integers of 16 bits as well: the greatest is 32,767 times their unit. The weighted sum of a block is
  exact too, and the unit is multiplied with it.

So beside the quantisation of keys and values nothing is rounded to less than 16 bits. Softmax and sums over blocks are
float32, in an order that the position of a query alone decides.

Covers: no sum reaches 2³¹, as 127 · 32,767 · 512 does not, and no more terms are ever added: columns of a score
(``INT8_HEAD_DIMS``) or keys of a block. A scale that is not finite makes every output not finite that sees its key or
value. Tests: ``tests/model/test_block_attention.py``.
"""

from __future__ import annotations

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from tsqp.arith.jit import inline, kernel
from tsqp.arith.loops import quantise_row
from tsqp.model.attention_tiles import COLUMNS, HEADS, LANES, ROWS
from tsqp.model.compiled import _LEAST_POWER, _exp, _power, _sum, pointer
from tsqp.model.compiled_attention import (
    BLOCK_KEYS,
    BLOCK_QUERIES,
    KEYS,
    PART_KEYS,
    _aligned,
    _begin,
    _finish,
    _held,
    _keys_after,
    _multiply,
    _rank,
    _score,
    _soft_cap,
    _unrank,
    _weigh,
    _whole,
    _write_parts,
    join_parts,
)

__all__ = ["BLOCK_QUERIES", "PART_KEYS", "attend_rows", "attend_steps", "join_parts"]

_LEVELS = np.float32(32767.0)  # of queries and of weights
_NOTHING = np.float32(-np.inf)
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_INFINITE_BITS = np.uint32(0x7F800000)
_LEAST_UNIT = np.float32(2.0**-126)  # the least normal number; weights whose unit is below it are as good as 0
_FIRST, _KEYS, _ROWS, _COLUMNS, _BLOCK = (np.int64(n) for n in (0, KEYS, ROWS, COLUMNS, BLOCK_KEYS))
_INT32, _FLOAT = np.empty(0, np.int32), np.empty(0, np.float32)


# Without leave to reorder sums, which would undo how the quantiser rounds.
@kernel
def _take(q, words, scales, at):  # type: ignore[no-untyped-def]
    """One query float32 (d,) to row ``at`` of words int32 (n, ≥ d / 2), and its scale."""
    scales[at] = quantise_row(q, _LEVELS, words[at].view(np.int16)[: len(q)])


@kernel
def _soften(scores, weights, row, begin, seen, count, scale, cap, k_scales, v_scales, numbers, state):  # type: ignore[no-untyped-def]
    """Softmax of a row of scores int32 over the keys ``begin`` to ``seen`` of a block, on top of the blocks before it.

    ``scale`` is that of the query, ``cap`` the soft cap of scores or 0; k_scales and v_scales float32 are those of the
    block's keys and values. Of the first ``count`` weights int16 those of the other keys become 0. numbers float32
    (≥ seen,): memory. state float32 (4,): the greatest score, the sum of exponentials, what earlier sums are multiplied
    by, and the unit of the weights.
    """
    own, mine, others = scores[row, begin:seen], weights[row, begin:seen], weights[row, :count]
    of_keys, of_values, wide = k_scales[begin:seen], v_scales[begin:seen], numbers[: seen - begin]
    old = state[0]
    rank = _rank(_NOTHING)
    for j in range(len(own)):
        score = np.float32(own[j]) * (of_keys[j] * scale)
        wide[j] = score
        rank = max(rank, _rank(score))
    if cap > _ZERO:
        rank = _soft_cap(wide, _ONE, cap)
    top = max(old, _unrank(rank))
    factor = _exp(old - top) if old > _NOTHING else _ZERO
    for j in range(len(own)):
        wide[j] = _power(max(wide[j] - top, _LEAST_POWER))
    total, largest = _sum(wide), np.uint32(0)
    for j in range(len(own)):
        weight = np.float32(wide[j] * of_values[j])
        wide[j] = weight
        largest = max(largest, weight.view(np.uint32))  # of floats without sign, the order of the bits is the order
    unit = np.uint32(largest).view(np.float32) / _LEVELS
    inverse = np.float32(1.0) / unit if unit >= _LEAST_UNIT and largest < _INFINITE_BITS else _ZERO
    for j in range(begin):
        others[j] = np.int16(0)
    for j in range(len(own)):  # what is not finite may become any integer, as the unit is not finite then either
        mine[j] = np.int16(np.int32(wide[j] * inverse + _HALF))
    for j in range(seen, count):
        others[j] = np.int16(0)
    state[0] = top
    state[1] = state[1] * factor + total
    state[2], state[3] = factor, unit


@inline
def _scales(address, offset, rows):  # type: ignore[no-untyped-def]
    """Scales of one KV head, ``offset`` bytes from an address on."""
    return carray(pointer(address + offset, _FLOAT), (rows,))  # type: ignore[call-arg]


@kernel
def _accumulate(mixed, rows, sums, state, at):  # type: ignore[no-untyped-def]
    """``sums[at + i] = sums[at + i] · factor + mixed[i] · unit`` for ``rows`` rows; sums (n, d), mixed int32."""
    for i in range(rows):
        factor, unit, own, more = state[at + i, 2], state[at + i, 3], sums[at + i], mixed[i]
        for c in range(len(own)):
            own[c] = own[c] * factor + np.float32(more[c]) * unit


@kernel
def attend_steps(q, items, kv_heads, scale, cap, caches, parts, starts, out, first, end):  # type: ignore[no-untyped-def]
    """One query of each sequence over some of its keys: the work of item n % len(items) and KV head n // len(items).

    q float32 (heads, T, d); caches int64 (sequences, 6): the row of q, the addresses of K and of V, the bytes from one
    of their heads to the next, the addresses of the scales of K and of V; items int64 (n, 3): sequence, first key, end
    key. parts float32 (n, heads, d + 2) becomes the weighted sum of V, then the greatest score, then the sum of
    exponentials. Whoever does all of the work joins the parts as well; ``starts`` and ``out`` are those of
    ``join_parts``.
    """
    d, group = q.shape[2], len(q) // kv_heads
    rows, whole = _whole(group, HEADS), _whole(d // 2, LANES)
    like = np.empty((0, 0, d), np.int8)
    queries, weights = _aligned(rows, whole, _INT32), _aligned(rows, _KEYS // 2, _INT32)
    scores, mixed = _aligned(rows, _KEYS, _INT32), _aligned(rows, whole * 2, _INT32)
    own, numbers, q_scales = weights.view(np.int16), np.empty(KEYS, np.float32), np.empty(group, np.float32)
    sums, state = np.empty((group, d), np.float32), np.empty((group, 4), np.float32)
    for work in range(first, end):
        item, head = work % len(items), work // len(items)
        sequence, low, high = items[item, 0], items[item, 1], items[item, 2]
        offset = head * caches[sequence, 3]
        k, v = _held(caches[sequence, 1], offset, like, high), _held(caches[sequence, 2], offset, like, high)
        offset = offset // d * _FLOAT.itemsize
        k_scales, v_scales = _scales(caches[sequence, 4], offset, high), _scales(caches[sequence, 5], offset, high)
        k_after, first_after = _keys_after(work, items, kv_heads, caches, like)
        for g in range(group):
            _take(q[head * group + g, caches[sequence, 0]], queries, q_scales, g)
        _begin(sums, state)
        for start in range(low, high, KEYS):
            count = min(KEYS, high - start)
            steps = _whole(count, 2) // 2
            _score(queries, k, start, count, scores, v)
            for g in range(group):
                of_keys, of_values = k_scales[start : start + count], v_scales[start : start + count]
                own_scale = scale * q_scales[g]
                _soften(scores, own, g, _FIRST, count, steps * 2, own_scale, cap, of_keys, of_values, numbers, state[g])
            mixed[:] = 0
            if start + KEYS < high:
                _weigh(weights, v, start, steps, mixed, k, start + KEYS)
            else:
                _weigh(weights, v, start, steps, mixed, k_after, first_after)
            _accumulate(mixed, group, sums, state, _FIRST)
        _write_parts(sums, state, parts[item], head * group)
    if first == 0 and end == len(items) * kv_heads:
        join_parts(parts, starts, caches, out, _FIRST, len(caches))


@kernel
def _pack_keys(k, first, count, panels):  # type: ignore[no-untyped-def]
    """``count`` keys int8 from ``first`` on as panels int32 (n, d / 2, columns): a column for each key.

    What is beyond the keys stays.
    """
    for j in range(count):
        panel, row = panels[j // COLUMNS], k[first + j]
        for i in range(len(row) // 2):
            panel[i, j % COLUMNS] = _word(row[2 * i], row[2 * i + 1])


@kernel
def _pack_values(v, first, count, panels):  # type: ignore[no-untyped-def]
    """``count`` values int8 from ``first`` on as panels int32 (n, steps, columns): a word has those of two keys.

    The last key of an odd number stands beside itself. What is beyond the columns stays.
    """
    for left in range(0, v.shape[1], COLUMNS):
        for step in range((count + 1) // 2):
            one, other = v[first + 2 * step], v[first + min(2 * step + 1, count - 1)]
            packed = panels[left // COLUMNS, step]
            for i in range(min(COLUMNS, len(one) - left)):
                packed[i] = _word(one[left + i], other[left + i])


@inline
def _word(first, second):  # type: ignore[no-untyped-def]
    """Two integers as one word."""
    return np.int32(np.int32(np.int32(first) & np.int32(0xFFFF)) | np.int32(np.int32(second) << np.int32(16)))


@kernel
def attend_rows(q, items, kv_heads, scale, cap, window, out, first, end):  # type: ignore[no-untyped-def]
    """Queries of one sequence at consecutive positions, at most ``BLOCK_QUERIES``, over the keys that they see.

    The work of item n % len(items) and KV head n // len(items). q float32 (heads, T, d); items int64 (n, 8): the row of
    q of the first query, its position, the number of queries, the addresses of K and of V, the bytes from one of their
    heads to the next, the addresses of the scales of K and of V. out (T, heads, d).
    """
    d, group = q.shape[2], len(q) // kv_heads
    width, panels = d // 2, _whole(d, COLUMNS) // COLUMNS
    like = np.empty((0, 0, d), np.int8)
    keys_of = _aligned(_BLOCK // COLUMNS * width, _COLUMNS, _INT32).reshape(-1, width, COLUMNS)
    values_of = _aligned(panels * BLOCK_KEYS // 2, _COLUMNS, _INT32).reshape(panels, -1, COLUMNS)
    scores, weights = _aligned(_ROWS, _BLOCK, _INT32), _aligned(_ROWS, _BLOCK // 2, _INT32)
    mixed, own = _aligned(_ROWS, panels * COLUMNS, _INT32), weights.view(np.int16)
    queries, numbers = _aligned(group * BLOCK_QUERIES, width, _INT32), np.empty(BLOCK_KEYS, np.float32)
    q_scales = np.empty(group * BLOCK_QUERIES, np.float32)
    sums, state = np.empty((group * BLOCK_QUERIES, d), np.float32), np.empty((group * BLOCK_QUERIES, 4), np.float32)
    for work in range(first, end):
        item, head = work % len(items), work // len(items)
        row, position, count = items[item, 0], items[item, 1], items[item, 2]
        offset, high = head * items[item, 5], position + count
        k, v = _held(items[item, 3], offset, like, high), _held(items[item, 4], offset, like, high)
        offset = offset // d * _FLOAT.itemsize
        k_scales, v_scales = _scales(items[item, 6], offset, high), _scales(items[item, 7], offset, high)
        for g in range(group):
            for i in range(count):
                _take(q[head * group + g, row + i], queries, q_scales, g * BLOCK_QUERIES + i)
        _begin(sums, state)
        for block in range(max(0, position + 1 - window) // BLOCK_KEYS * BLOCK_KEYS, high, BLOCK_KEYS):
            size = min(BLOCK_KEYS, high - block)
            _pack_keys(k, block, size, keys_of)
            _pack_values(v, block, size, values_of)
            of_keys, of_values = k_scales[block : block + size], v_scales[block : block + size]
            for strip in range(group * _whole(count, ROWS) // ROWS):
                g, start = strip % group, strip // group * ROWS
                rows, at = min(ROWS, count - start), g * BLOCK_QUERIES + start
                seen = min(size, position + start + rows - block)  # by the last of them
                if seen <= 0:
                    continue
                steps = _whole(seen, 2) // 2
                _multiply(queries, at, rows, keys_of, width, _whole(seen, COLUMNS) // COLUMNS, scores)
                for i in range(rows):
                    after = position + start + i + 1 - block
                    stop = max(0, min(size, after))
                    begin = min(max(0, after - window), stop)
                    own_scale, mine = scale * q_scales[at + i], state[at + i]
                    _soften(scores, own, i, begin, stop, steps * 2, own_scale, cap, of_keys, of_values, numbers, mine)
                _multiply(weights, _FIRST, rows, values_of, steps, panels, mixed)
                _accumulate(mixed, rows, sums, state, at)
        for g in range(group):
            at = g * BLOCK_QUERIES
            _finish(sums[at:], state[at:], count, row, head * group + g, out)
