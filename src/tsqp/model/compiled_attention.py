"""Loops of attention that numba compiles; see ``block_attention.py``, which says in which order they run.

As in ``compiled.py``: float32, or uint16 that hold bfloat16; lock released. Scores, softmax and every sum are float32.
The order of each sum is that of the source and of the compiled code, for a number of terms that the position of a
query alone decides: nothing here knows how many rows, sequences or threads there are.
"""

from __future__ import annotations

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from tsqp.model.compiled import _exp, _inline, _kernel, _narrow, _widen, pointer

KEYS = 64  # keys that a decode step widens at once: a block of them, in float32, stays in the first-level cache
PART_KEYS = 1024  # keys of one item of work of a decode step: edges at multiples of it

_NOTHING = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@_inline
def _rank(x):  # type: ignore[no-untyped-def]
    """float32 as int32 of the same order: a loop for the greatest integer vectorises, for the greatest float not."""
    number = np.float32(x).view(np.int32)
    return np.int32(number ^ np.int32(np.int32(number >> np.int32(31)) & _MAGNITUDE))


@_inline
def _unrank(rank):  # type: ignore[no-untyped-def]
    return np.int32(rank ^ np.int32(np.int32(rank >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@_inline
def _widen_block(source, first, count, wide):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``first + count`` of (keys, d) as float32, once for all heads that share them."""
    for j in range(count):
        row, target = source[first + j], wide[j]
        for c in range(len(target)):
            target[c] = _widen(row[c])


@_inline
def _score(query, wide, count, scores):  # type: ignore[no-untyped-def]
    """``scores[j]`` = query · wide[j], four keys at a time; each sum is over the same columns in the same order."""
    for j in range(0, (count + 3) // 4 * 4, 4):  # past the end lies an older block: computed and not looked at
        k0, k1, k2, k3 = wide[j], wide[j + 1], wide[j + 2], wide[j + 3]
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(query.shape[0]):
            s0 += query[i] * k0[i]
            s1 += query[i] * k1[i]
            s2 += query[i] * k2[i]
            s3 += query[i] * k3[i]
        scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = s0, s1, s2, s3


@_inline
def _weigh(scores, count, wide, sums):  # type: ignore[no-untyped-def]
    """``sums`` (d,) += Σ scores[j]·wide[j], four keys at a time: the sums are read and written a quarter as often."""
    whole = count // 4 * 4
    for j in range(0, whole, 4):
        a, b, c, e = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
        v0, v1, v2, v3 = wide[j], wide[j + 1], wide[j + 2], wide[j + 3]
        for i in range(sums.shape[0]):
            sums[i] += (a * v0[i] + b * v1[i]) + (c * v2[i] + e * v3[i])
    for j in range(whole, count):
        a, v0 = scores[j], wide[j]
        for i in range(sums.shape[0]):
            sums[i] += a * v0[i]


@_kernel
def attend_steps(q, caches, items, kv_heads, scale, parts, first, end):  # type: ignore[no-untyped-def]
    """One query of each sequence over some of its keys: the work of item n // kv_heads and its KV head n % kv_heads.

    q (heads, T, d); caches int64 (sequences, 4): the row of q, the addresses of K and of V, and the elements from one
    of their heads to the next; items int64 (n, 3): sequence, first key, end key. parts (n, heads, d + 2) becomes the
    weighted sum of V, then the greatest score, then the sum of weights.
    """
    heads, d = q.shape[0], q.shape[2]
    group = heads // kv_heads
    wide, weights = np.zeros((KEYS, d), np.float32), np.empty(KEYS, np.float32)
    queries, scores = np.empty((group, d), np.float32), np.empty((group, KEYS), np.float32)
    for work in range(first, end):
        item, kv_head = work // kv_heads, work % kv_heads
        sequence, low, high = items[item, 0], items[item, 1], items[item, 2]
        offset = kv_head * caches[sequence, 3] * q.itemsize
        k = carray(pointer(caches[sequence, 1] + offset, q), (high, d))  # type: ignore[call-arg]
        v = carray(pointer(caches[sequence, 2] + offset, q), (high, d))
        for g in range(group):
            for i in range(d):
                queries[g, i] = _widen(q[kv_head * group + g, caches[sequence, 0], i]) * scale
            for i in range(d):
                parts[item, kv_head * group + g, i] = _ZERO
            parts[item, kv_head * group + g, d] = _NOTHING
            parts[item, kv_head * group + g, d + 1] = _ZERO
        for block in range(low // KEYS * KEYS, high, KEYS):
            start = max(block, low)
            count = min(block + KEYS, high) - start
            _widen_block(k, start, count, wide)
            for g in range(group):
                _score(queries[g], wide, count, scores[g])
            _widen_block(v, start, count, wide)
            for g in range(group):
                part = parts[item, kv_head * group + g]
                rank = _rank(part[d])
                for j in range(count):
                    rank = max(rank, _rank(scores[g, j]))
                top = _unrank(rank)
                factor = _exp(part[d] - top) if part[d] > _NOTHING else _ZERO
                total = _ZERO
                for j in range(count):
                    weights[j] = _exp(scores[g, j] - top)
                    total += weights[j]
                part[d] = top
                part[d + 1] = part[d + 1] * factor + total
                sums = part[:d]
                for i in range(d):
                    sums[i] *= factor
                _weigh(weights, count, wide, sums)


@_kernel
def join_parts(parts, starts, caches, out, first, end):  # type: ignore[no-untyped-def]
    """The parts ``starts[s]`` to ``starts[s + 1]`` of each sequence, in their order, to its row of out.

    out (T, heads, d).
    """
    d = out.shape[2]
    for sequence in range(first, end):
        row = caches[sequence, 0]
        for head in range(out.shape[1]):
            top = _NOTHING
            for part in range(starts[sequence], starts[sequence + 1]):
                top = max(top, parts[part, head, d])
            sums = parts[starts[sequence], head]
            own = _exp(sums[d] - top)
            for i in range(d):
                sums[i] *= own
            total = sums[d + 1] * own
            for part in range(starts[sequence] + 1, starts[sequence + 1]):
                own = _exp(parts[part, head, d] - top)
                total += parts[part, head, d + 1] * own
                for i in range(d):
                    sums[i] += parts[part, head, i] * own
            for i in range(d):
                out[row, head, i] = _narrow(sums[i] / total, out[row, head, i])


@_kernel
def soften(scores, weights, state, start, rows, first_key, window, scale, first, end):  # type: ignore[no-untyped-def]
    """Softmax over one block of keys, on top of the blocks before it: ``end - first`` of heads · ``rows`` queries.

    scores, weights (heads, block, keys) of queries from position ``start`` and keys from ``first_key`` on; a query
    outside of its window or before a key has weight 0 there. ``rows`` (2,): the rows of the block that are wanted.
    state float32 (heads, block, 3): the greatest score, the sum of weights, and what earlier sums are multiplied by.
    """
    low, count = rows[0], rows[1] - rows[0]
    keys = scores.shape[2]
    for work in range(first, end):
        head, row = work // count, low + work % count
        position = start + row
        seen = min(keys, position + 1 - first_key)
        begin = min(max(0, position + 1 - window - first_key), max(seen, 0))
        own, mine = scores[head, row, begin : max(seen, begin)], weights[head, row, begin : max(seen, begin)]
        old = state[head, row, 0]
        rank = _rank(old)
        for j in range(len(own)):
            rank = max(rank, _rank(_widen(own[j]) * scale))
        top = _unrank(rank)
        factor = _exp(old - top) if old > _NOTHING else _ZERO
        total = _ZERO
        for j in range(begin):
            weights[head, row, j] = _narrow(_ZERO, weights[head, row, j])
        for j in range(len(own)):
            weight = _narrow(_exp(_widen(own[j]) * scale - top), mine[j])
            mine[j] = weight
            total += _widen(weight)  # as the product takes it, so that the weights of a row sum to 1
        for j in range(max(seen, 0), keys):
            weights[head, row, j] = _narrow(_ZERO, weights[head, row, j])
        state[head, row, 0] = top
        state[head, row, 1] = state[head, row, 1] * factor + total
        state[head, row, 2] = factor


@_kernel
def accumulate(mixed, state, rows, sums, first, end):  # type: ignore[no-untyped-def]
    """``sums = sums · factor + mixed``, both (heads, block, d); state and rows as in ``soften``."""
    low, count = rows[0], rows[1] - rows[0]
    for work in range(first, end):
        head, row = work // count, low + work % count
        factor = state[head, row, 2]
        for i in range(sums.shape[2]):
            sums[head, row, i] = sums[head, row, i] * factor + _widen(mixed[head, row, i])


@_kernel
def finish(sums, state, rows, out, target, first, end):  # type: ignore[no-untyped-def]
    """Sums over the sum of weights: row ``rows[0]`` of the block to row ``target`` of out (T, heads, d), and so on."""
    low, count = rows[0], rows[1] - rows[0]
    for work in range(first, end):
        head, row = work // count, work % count
        total = state[head, low + row, 1]
        for i in range(out.shape[2]):
            out[target + row, head, i] = _narrow(sums[head, low + row, i] / total, out[target + row, head, i])
