"""Loops of attention that numba compiles; see ``block_attention.py``, which says in which order they run.

Queries, keys and values are words, as ``attention_tiles.py`` has them: uint32 of two bfloat16 numbers, or float32. The
lock of the interpreter is released. Scores, softmax and every sum are float32; weights are rounded to what the values
are. The order of each sum is that of the source and of the compiled code, for a number of terms that the position of a
query alone decides: nothing here knows how many rows, sequences or threads there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import overload

from tsqp.arith.jit import inline, kernel
from tsqp.model.attention_tiles import COLUMNS, HEADS, LANES, ROWS, multiply_tile, score_tile, weigh_tile
from tsqp.model.compiled import _LEAST_POWER, _exp, _narrow, _power, _sum, _widen, fused, pointer

KEYS = 256  # keys of a decode step whose scores are taken before their values are weighed
PART_KEYS = 1024  # keys of one item of work of a decode step: edges at multiples of it
BLOCK_KEYS = 512  # keys of a prefill that are packed at once: edges at multiples of it
BLOCK_QUERIES = 128  # queries, of each head of a group, that share packed keys

_LINE = 64  # bytes
_NOTHING = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Arguments of loops are these, as numba would compile a loop once for each constant of type int that it is called with.
_FIRST, _KEYS, _ROWS, _COLUMNS, _BLOCK = (np.int64(n) for n in (0, KEYS, ROWS, COLUMNS, BLOCK_KEYS))
_COARSE = np.float32(2**24)  # above it float32 has not all integers
_MAGNITUDE = np.int32(0x7FFFFFFF)
_HALF, _LOW = np.uint32(16), np.uint32(0xFFFF)  # of a word


def _numbers(words: Any) -> Any:
    """Words as the numbers that they hold: bfloat16 as uint16, or float32."""
    return words if words.dtype == np.float32 else words.view(np.uint16)  # for those who do not compile


@overload(_numbers, inline="always")
def _numbers_of(words):  # type: ignore[no-untyped-def]
    if isinstance(words.dtype, types.Float):
        return lambda words: words
    return lambda words: words.view(np.uint16)


@inline
def _rank(x):  # type: ignore[no-untyped-def]
    """float32 as int32 of the same order: a loop for the greatest integer vectorises, for the greatest float not."""
    number = np.float32(x).view(np.int32)
    return np.int32(number ^ np.int32(np.int32(number >> np.int32(31)) & _MAGNITUDE))


@inline
def _unrank(rank):  # type: ignore[no-untyped-def]
    return np.int32(rank ^ np.int32(np.int32(rank >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@inline
def _whole(count, size):  # type: ignore[no-untyped-def]
    """``count`` up to a multiple of ``size``."""
    return (count + size - 1) // size * size


@kernel
def _aligned(rows, width, like):  # type: ignore[no-untyped-def]
    """Zeros (rows, width) of the type of ``like``, from the start of a cache line."""
    size = rows * width * like.itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    return memory[skip : skip + size].view(like.dtype).reshape(rows, width)


@kernel
def _score(queries, k, first, count, scores, v):  # type: ignore[no-untyped-def]
    """``scores[i, j]`` = queries[i] · k[first + j] for ``count`` keys, four rows and four keys at a time.

    The same rows of v are asked for meanwhile.
    """
    for row in range(0, len(queries), HEADS):
        for j in range(0, count, HEADS):
            score_tile(queries, row, k, first + j, scores, j, v)


@kernel
def _weigh(weights, v, first, steps, sums, k, first_after):  # type: ignore[no-untyped-def]
    """``sums[i]`` += Σ weights[i]·v over ``steps`` words of weights, values from ``first`` on, four rows at a time.

    As many rows of k from ``first_after`` on are asked for meanwhile.
    """
    for row in range(0, len(sums), HEADS):
        weigh_tile(weights, row, v, first, steps, sums, k, first_after - first)


@kernel
def _multiply(x, first, rows, panels, steps, count, out):  # type: ignore[no-untyped-def]
    """``rows`` rows of x from ``first`` on times the first ``steps`` rows of ``count`` packed panels."""
    for panel in range(count):
        multiply_tile(x, first, rows, panels[panel], steps, out, panel * COLUMNS)


@kernel
def _begin(sums, state):  # type: ignore[no-untyped-def]
    """No key has been seen: sums (rows, d); state (rows, 3) as ``_soften`` has it."""
    for row in range(len(state)):
        state[row, 0], state[row, 1] = _NOTHING, _ZERO
    for row in range(len(sums)):
        for i in range(sums.shape[1]):
            sums[row, i] = _ZERO


@kernel
def _soft_cap(scores, scale, cap):  # type: ignore[no-untyped-def]
    """``cap · tanh(scale · score / cap)`` of scores float32 (n,) in place; the rank of the greatest.

    Right to some 1e-7 of the cap, as sums of float32 of that size are.
    """
    rank, twice = _rank(_NOTHING), np.float32(2) * scale / cap
    for j in range(len(scores)):
        power = scores[j] * twice
        capped = cap - cap * (np.float32(2) / (_ONE + _exp(power)))
        scores[j] = capped if power == power else power  # what is no number stays so
        rank = max(rank, _rank(scores[j]))
    return rank


@kernel
def _soften(scores, weights, row, begin, seen, count, scale, cap, state):  # type: ignore[no-untyped-def]
    """Softmax of one row of scores over the keys ``begin`` to ``seen`` of a block, on top of the blocks before it.

    Of the first ``count`` weights those of the other keys become 0; the scores become the weights. ``scale`` > 0.
    ``cap``: the soft cap of scores, 0 for none. state float32 (3,): the greatest score, the sum of weights, and what
    earlier sums are multiplied by.
    """
    own, mine, others = scores[row, begin:seen], weights[row, begin:seen], weights[row, :count]
    old = state[0]
    if cap > _ZERO:
        _soft_cap(own, scale, cap)
        scale = _ONE
    rank = _rank(_NOTHING)
    for j in range(len(own)):
        rank = max(rank, _rank(own[j]))
    top = max(old, np.float32(_unrank(rank) * scale))
    if abs(top) > _COARSE:  # the greatest score would differ from top, which is rounded: at 2^32 by up to 256
        for j in range(len(own)):
            own[j] = own[j] * scale
        scale = _ONE
    factor = _exp(old - top) if old > _NOTHING else _ZERO
    for j in range(begin):
        others[j] = _narrow(_ZERO, others[j])
    for j in range(len(own)):
        mine[j] = _narrow(_power(max(fused(own[j], scale, -top), _LEAST_POWER)), mine[j])
        own[j] = _widen(mine[j])
    total = _sum(own)  # of weights as the product takes them, so that those of a row sum to 1
    for j in range(seen, count):
        others[j] = _narrow(_ZERO, others[j])
    state[0] = top
    state[1] = state[1] * factor + total
    state[2] = factor


@inline
def _held(address, offset, like, rows):  # type: ignore[no-untyped-def]
    """Keys or values of one KV head, ``offset`` bytes from an address on: ``rows`` rows like those of ``like``."""
    return carray(pointer(address + offset, like), (rows, like.shape[2]))  # type: ignore[call-arg]


@kernel
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


@inline
def _keys_after(work, items, kv_heads, caches, like):  # type: ignore[no-untyped-def]
    """Keys of the work after this one, for whoever asks for them ahead, and the first of them."""
    after = (work + 1) % len(items)
    sequence = items[after, 0]
    offset = (work + 1) // len(items) % kv_heads * caches[sequence, 3]
    return _held(caches[sequence, 1], offset, like, items[after, 2]), items[after, 1]


@kernel
def _write_parts(sums, state, parts, first):  # type: ignore[no-untyped-def]
    """What a step has found for the heads of one group, to the rows of parts (heads, d + 2) from ``first`` on."""
    d = parts.shape[1] - 2
    for g in range(len(state)):
        part = parts[first + g]
        for i in range(d):
            part[i] = sums[g, i]
        part[d], part[d + 1] = state[g, 0], state[g, 1]


@kernel
def attend_steps(q, items, kv_heads, scale, cap, caches, parts, starts, out, first, end):  # type: ignore[no-untyped-def]
    """One query of each sequence over some of its keys: the work of item n % len(items) and KV head n // len(items).

    q words (heads, T, n); caches int64 (sequences, 4): the row of q, the addresses of K and of V, and the bytes from
    one of their heads to the next; items int64 (n, 3): sequence, first key, end key. parts float32 (n, heads, d + 2)
    becomes the weighted sum of V, then the greatest score, then the sum of weights. Whoever does all of the work joins
    the parts as well; ``starts`` and ``out`` are those of ``join_parts``.
    """
    width, d = q.shape[2], parts.shape[2] - 2
    group, numbers = len(q) // kv_heads, d // width
    rows, whole = _whole(group, HEADS), _whole(width, LANES)
    queries, weights = _aligned(rows, whole, q), _aligned(rows, _KEYS // numbers, q)
    scores, sums = _aligned(rows, _KEYS, parts), _aligned(rows, whole * numbers, parts)
    own, state = _numbers(weights), np.empty((group, 3), np.float32)
    for work in range(first, end):
        item, head = work % len(items), work // len(items)
        sequence, low, high = items[item, 0], items[item, 1], items[item, 2]
        offset = head * caches[sequence, 3]
        k, v = _held(caches[sequence, 1], offset, q, high), _held(caches[sequence, 2], offset, q, high)
        k_after, first_after = _keys_after(work, items, kv_heads, caches, q)
        for g in range(group):
            for i in range(width):
                queries[g, i] = q[head * group + g, caches[sequence, 0], i]
        _begin(sums, state)
        for start in range(low, high, KEYS):
            count = min(KEYS, high - start)
            steps = _whole(count, numbers) // numbers
            _score(queries, k, start, count, scores, v)
            for g in range(group):
                _soften(scores, own, g, _FIRST, count, steps * numbers, scale, cap, state[g])
                for i in range(d):
                    sums[g, i] *= state[g, 2]
            if start + KEYS < high:
                _weigh(weights, v, start, steps, sums, k, start + KEYS)
            else:
                _weigh(weights, v, start, steps, sums, k_after, first_after)
        _write_parts(sums, state, parts[item], head * group)
    if first == 0 and end == len(items) * kv_heads:
        join_parts(parts, starts, caches, out, _FIRST, len(caches))


@kernel
def _pack_keys(k, first, count, panels):  # type: ignore[no-untyped-def]
    """``count`` keys from ``first`` on, words (keys, width), as panels (n, width, columns): a column for each key.

    What is beyond the keys stays.
    """
    for j in range(count):
        panel, row = panels[j // COLUMNS], k[first + j]
        for i in range(len(row)):
            panel[i, j % COLUMNS] = row[i]


def _pack_values(v: Any, first: Any, count: Any, panels: Any) -> Any:
    """``count`` values from ``first`` on, words (keys, width), as panels (n, steps, columns).

    A word has the numbers of one column, of as many keys as it holds. The last key of an odd number stands beside
    itself. What is beyond the columns stays.
    """
    raise NotImplementedError


@overload(_pack_values)
def _pack_values_as(v, first, count, panels):  # type: ignore[no-untyped-def]
    def floats(v, first, count, panels):  # type: ignore[no-untyped-def]
        for left in range(0, v.shape[1], COLUMNS):
            for step in range(count):
                row, packed = v[first + step], panels[left // COLUMNS, step]
                for i in range(min(COLUMNS, len(row) - left)):
                    packed[i] = row[left + i]

    def pairs(v, first, count, panels):  # type: ignore[no-untyped-def]
        for left in range(0, v.shape[1], COLUMNS // 2):
            for step in range((count + 1) // 2):
                one, other = v[first + 2 * step], v[first + min(2 * step + 1, count - 1)]
                packed = panels[left // (COLUMNS // 2), step]
                for i in range(min(COLUMNS // 2, len(one) - left)):
                    a, b = one[left + i], other[left + i]
                    packed[2 * i] = np.uint32(np.uint32(a & _LOW) | np.uint32(b << _HALF))
                    packed[2 * i + 1] = np.uint32(np.uint32(a >> _HALF) | np.uint32(b & ~_LOW))

    return floats if isinstance(v.dtype, types.Float) else pairs


@kernel
def _accumulate(mixed, rows, sums, state, at):  # type: ignore[no-untyped-def]
    """``sums[at + i] = sums[at + i] · factor + mixed[i]`` for ``rows`` rows; sums (n, d)."""
    for i in range(rows):
        factor, own, more = state[at + i, 2], sums[at + i], mixed[i]
        for c in range(len(own)):
            own[c] = fused(own[c], factor, more[c])


@kernel
def _finish(sums, state, count, row, head, out):  # type: ignore[no-untyped-def]
    """The first ``count`` sums over their sums of weights, to rows of out (T, heads, d) from ``row`` on."""
    for i in range(count):
        own, target, total = sums[i], out[row + i, head], state[i, 1]
        for c in range(len(target)):
            target[c] = _narrow(own[c] / total, target[c])


@kernel
def attend_rows(q, items, kv_heads, scale, cap, window, out, first, end):  # type: ignore[no-untyped-def]
    """Queries of one sequence at consecutive positions, at most ``BLOCK_QUERIES``, over the keys that they see.

    The work of item n % len(items) and KV head n // len(items). q words (heads, T, n); items int64 (n, 6): the row of q
    of the first query, its position, the number of queries, the addresses of K and of V, and the bytes from one of
    their heads to the next. out (T, heads, d).
    """
    width, d = q.shape[2], out.shape[2]
    group, numbers = len(q) // kv_heads, d // width
    panels = _whole(d, COLUMNS) // COLUMNS
    keys_of = _aligned(_BLOCK // COLUMNS * width, _COLUMNS, q).reshape(-1, width, COLUMNS)
    values_of = _aligned(panels * BLOCK_KEYS // numbers, _COLUMNS, q).reshape(panels, -1, COLUMNS)
    sums, state = np.empty((group * BLOCK_QUERIES, d), np.float32), np.empty((group * BLOCK_QUERIES, 3), np.float32)
    scores, weights = _aligned(_ROWS, _BLOCK, sums), _aligned(_ROWS, _BLOCK // numbers, q)
    mixed, own = _aligned(_ROWS, panels * COLUMNS, sums), _numbers(weights)
    for work in range(first, end):
        item, head = work % len(items), work // len(items)
        row, position, count = items[item, 0], items[item, 1], items[item, 2]
        offset, high = head * items[item, 5], position + count
        k, v = _held(items[item, 3], offset, q, high), _held(items[item, 4], offset, q, high)
        _begin(sums, state)
        for block in range(max(0, position + 1 - window) // BLOCK_KEYS * BLOCK_KEYS, high, BLOCK_KEYS):
            size = min(BLOCK_KEYS, high - block)
            _pack_keys(k, block, size, keys_of)
            _pack_values(v, block, size, values_of)
            for strip in range(group * _whole(count, ROWS) // ROWS):
                g, start = strip % group, strip // group * ROWS
                rows, at = min(ROWS, count - start), g * BLOCK_QUERIES + start
                seen = min(size, position + start + rows - block)  # by the last of them
                if seen <= 0:
                    continue
                steps = _whole(seen, numbers) // numbers
                queries = q[head * group + g]
                _multiply(queries, row + start, rows, keys_of, width, _whole(seen, COLUMNS) // COLUMNS, scores)
                for i in range(rows):
                    after = position + start + i + 1 - block
                    stop = max(0, min(size, after))
                    begin = min(max(0, after - window), stop)
                    _soften(scores, own, i, begin, stop, steps * numbers, scale, cap, state[at + i])
                _multiply(weights, _FIRST, rows, values_of, steps, panels, mixed)
                _accumulate(mixed, rows, sums, state, at)
        for g in range(group):
            at = g * BLOCK_QUERIES
            _finish(sums[at:], state[at:], count, row, head * group + g, out)
