"""A step of few rows of a private mode as compiled code; see ``decode_step.py``, which prepares it and says what it is.

One loop takes some rows, of answers and of prompts, through all layers: it computes an operator, has the guard's own
loops quantise and mask its result, exchanges the call for its answer, has them check and unmask that, adds what the
rows' adapters add, and goes on. It is the plain way (``DecoderLayers.steps`` over ``CheckedLinears``) without the
interpreter: every loop here is one of those that the plain way calls, in the same order, so the bits are the same
(test_decode_step.py).

Rows are independent between two calls, so threads share them out where that is worth while (``arith/crew.py``): the
one that makes the step leads, and waits for all rows after each part of the work.

What is of the guard, and to be read beside it: ``_mask`` and ``_unmask``. A row is sent once all rows have the verdict
OK; a reply is read once, into private memory; nothing looks at a product before every row of it has the verdict OK.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core.cgutils import voidptr_t
from numba.extending import intrinsic

from tsqp.arith.crew import HELPERS, OF, OPEN, WHAT, call_helpers, done, next_item, say, send_away, take, wait
from tsqp.arith.jit import inline, kernel
from tsqp.model.adapter_loops import add_low_rank
from tsqp.model.compiled import add_rms_norm, pointer, rms_norm, silu_mul, store
from tsqp.model.compiled_attention import PART_KEYS, attend_rows, attend_steps
from tsqp.trusted.guard.kernels import OK, UNSEEN, quantise_and_mask, verify_and_unmask
from tsqp.wire.exchange import ANSWERED, exchange, now

# What is of a call, int64 (calls, 17): which of a layer's it is, its layer; rows, in and out features; addresses of the
# norm before it, of scales, bias, check vectors, projections and bounds of the one slice; the greatest activation;
# addresses of the memory that is sent and of the reply; the packet, its bytes, and where in it the call's number is.
KIND, LAYER, ROWS, INNER, OUTER, NORM, SCALES, BIAS, VECTORS, PROJECTIONS, BOUNDS, LIMIT, SENT, REPLY = range(14)
PACKET, SIZE, NUMBER = range(14, 17)
CALL_NUMBERS = 17
QKV, O, GATE_UP, DOWN, LM_HEAD = range(5)  # noqa: E741
# Where a step goes on, int64 (4,): the call, what is next of it, the packet's number, the call's number.
CALL, NEXT, SEQUENCE, ID = range(4)
OPERATE, MIX, ATTENDED, SEND, TAKE = range(5)
# Why it has come back: it is over; attention is to be shared out; rows have another verdict than OK; or as of exchange.
OVER, ATTEND, REFUSED, LINE = range(4)
# The parts of the work that threads share out by rows. (numba would compile all once for each constant of type int.)
DO_NORM, DO_STORE, DO_SILU, DO_ATTEND, DO_MASK, DO_UNMASK, DO_ADAPT = (np.int64(part) for part in range(7))
# Of an item of attention, int64 (items, 4): whose rows of the step; their number where they are of a prompt, 0 for a
# decode step; the KV heads from FIRST_HEAD to END_HEAD.
SPAN, PROMPT_ROWS, FIRST_HEAD, END_HEAD = range(4)
# When, ns, int64 (calls, TIMES): the operator began, rotary was done, and so was the operator, masked and about to
# send, the reply was there, it was checked, and adapters had added to it.
BEGAN, ROTATED, OPERATED, MASKED, ARRIVED, CHECKED, ADAPTED = range(7)
TIMES = 7

_FIRST, _ONE, _TWO = np.int64(0), np.int64(1), np.int64(2)
_NO_CAP = np.float32(0)  # blocks with a soft cap are not done here
_BYTE, _BYTE_BITS, _NUMBER_BYTES = np.int64(0xFF), np.int64(8), np.int64(8)


def _copied_once(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` bytes at the address ``source`` to ``target``, each read once: the compiler may not look again."""

    def copy(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        to, where, size = arguments
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [voidptr_t, voidptr_t, size.type])
        volatile = ir.Constant(ir.IntType(1), 1)
        builder.call(memcpy, [builder.inttoptr(to, voidptr_t), builder.inttoptr(where, voidptr_t), size, volatile])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), copy


_copy_once: Any = intrinsic(_copied_once)


@inline
def _held(address, like, rows, width):  # type: ignore[no-untyped-def]
    """The memory at an address as (rows, width), of the type of the array ``like``."""
    return carray(pointer(address, like), (rows, width))  # type: ignore[call-arg]


@kernel
def _mask(call, x, checks, masked, secrets, item, word, scales, expected, verdicts, first, end):  # type: ignore[no-untyped-def]
    """``quantise_and_mask`` of rows ``first`` to ``end`` of x, float32 (R, K), to where the call is sent from."""
    inner = call[INNER]
    sent = _held(call[SENT], item, len(x), inner)
    projections = _held(call[PROJECTIONS], word, checks, inner)
    for row in range(first, end):
        pads = _held(secrets[row, 0], word, _ONE, inner if masked else _FIRST)
        own, to, scale = x[row : row + 1], sent[row : row + 1], scales[row : row + 1]
        found, verdict = expected[row : row + 1], verdicts[row : row + 1]
        verdict[0] = UNSEEN
        limit = np.float32(call[LIMIT])
        quantise_and_mask(own, limit, projections, masked, pads, to, scale, found, verdict, _FIRST, _ONE)


@kernel
def _unmask(call, y, checks, masked, secrets, word, private, scales, expected, verdicts, first, end):  # type: ignore[no-untyped-def]
    """``verify_and_unmask`` of rows ``first`` to ``end`` of the reply to y, float32 (R, N).

    private uint32 (≥ N,), this thread's own, takes one row of the reply after another.
    """
    outer = call[OUTER]
    vectors = _held(call[VECTORS], word, checks, outer)
    bounds = _held(call[BOUNDS], call, _ONE, _TWO)[0]
    w_scales, bias = _held(call[SCALES], y, _ONE, outer)[0], _held(call[BIAS], y, _ONE, outer)[0]
    reply = _held(private.ctypes.data, word, _ONE, outer)
    for row in range(first, end):
        products = _held(secrets[row, 1], word, _ONE, outer if masked else _FIRST)
        own, scale = y[row : row + 1], scales[row : row + 1]
        found, verdict = expected[row : row + 1], verdicts[row : row + 1]
        verdict[0] = UNSEEN
        _copy_once(private.ctypes.data, call[REPLY] + row * outer * word.itemsize, outer * word.itemsize)
        check = (vectors, found, bounds, masked, products, (scale, w_scales, bias))
        verify_and_unmask(reply, *check, own, verdict, _FIRST, _ONE)


@kernel
def _all_good(verdicts):  # type: ignore[no-untyped-def]
    """Whether every row may be sent, or looked at."""
    good = True
    for row in range(len(verdicts)):
        good = good and verdicts[row] == OK
    return good


@kernel
def _number(call, at, byte):  # type: ignore[no-untyped-def]
    """Write the numbers of this packet, lowest byte first, and of this call, highest byte first, into the packet."""
    packet = _held(call[PACKET], byte, _ONE, call[SIZE])[0]
    for i in range(_NUMBER_BYTES):
        packet[i] = np.uint8((at[SEQUENCE] >> (_BYTE_BITS * i)) & _BYTE)
        packet[call[NUMBER] + _NUMBER_BYTES - 1 - i] = np.uint8((at[ID] >> (_BYTE_BITS * i)) & _BYTE)


@kernel
def _attend(q, table, items, window, kv_heads, scale, out):  # type: ignore[no-untyped-def]
    """Attention of some items, decode steps first, as ``BlockAttention`` has it on one thread.

    q words (heads, R, n); table int64 (S, 5): of each span of rows the first one, addresses of K and V, the bytes from
    one head to the next, and the first row's position. out float32 (R, heads, d).
    """
    steps = _FIRST
    while steps < len(items) and items[steps, PROMPT_ROWS] == 0:
        steps += 1
    if steps:
        _attend_steps(q, table, items[:steps], window, kv_heads, scale, out)
    block = np.empty((1, 6), np.int64)
    for n in range(steps, len(items)):
        span = table[items[n, SPAN]]
        block[0, 0], block[0, 1], block[0, 2] = span[0], span[4], items[n, PROMPT_ROWS]
        block[0, 3], block[0, 4], block[0, 5] = span[1], span[2], span[3]
        attend_rows(q, block, kv_heads, scale, _NO_CAP, window, out, items[n, FIRST_HEAD], items[n, END_HEAD])


@kernel
def _attend_steps(q, table, items, window, kv_heads, scale, out):  # type: ignore[no-untyped-def]
    """That of decode steps, each in parts of its keys."""
    rows, count = len(items), _FIRST
    caches, starts = np.empty((rows, 5), np.int64), np.empty(rows + 1, np.int64)
    for row in range(rows):
        caches[row] = table[items[row, SPAN]]
        starts[row], first = count, max(_FIRST, caches[row, 4] + 1 - window)
        count += caches[row, 4] // PART_KEYS - first // PART_KEYS + 1
    starts[rows] = count
    parts_of = np.empty((count, 3), np.int64)
    for row in range(rows):
        first, end = max(_FIRST, caches[row, 4] + 1 - window), caches[row, 4] + 1
        for n in range(starts[row], starts[row + 1]):
            edge = (first // PART_KEYS + n - starts[row]) * PART_KEYS
            parts_of[n, 0], parts_of[n, 1], parts_of[n, 2] = row, max(edge, first), min(edge + PART_KEYS, end)
    parts = np.empty((count, len(q), out.shape[2] + 2), np.float32)
    attend_steps(q, parts_of, kv_heads, scale, _NO_CAP, caches, parts, starts, out, _FIRST, count * kv_heads)


@kernel
def _do(part, c, first, end, thread, calls, guard, memory, work, room, caches):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``end`` of a part of the work around call ``c``; the tuples are those of ``decode``.

    Those of DO_ATTEND are items. ``thread``: which row of private memory is this thread's.
    """
    masked, checks, secrets = guard
    hidden, x_memory, y_memory, logits, wanted, private = memory
    eps, score_scale, kv_heads, _, cos, sin, q, q_words = work
    scales, expected, verdicts, item = room
    tables, windows, items, ropes, adapter_of_row, adapters = caches
    call, last, word = calls[c], calls[max(c - 1, 0)], private[0]
    layer, rows, inner, outer = call[LAYER], call[ROWS], call[INNER], call[OUTER]
    x = x_memory[: rows * inner].reshape(rows, inner)
    before = y_memory[: last[ROWS] * last[OUTER]].reshape(last[ROWS], last[OUTER])  # the last product
    if part == DO_NORM:
        norm = _held(call[NORM], hidden, _ONE, inner)[0]
        if c == 0:
            rms_norm(hidden, norm, eps, x, first, end)
        elif call[KIND] == LM_HEAD:
            for n in range(first, end):
                row = wanted[n]
                own, more = hidden[row : row + 1], before[row : row + 1]
                add_rms_norm(own, more, norm, eps, x[n : n + 1], _FIRST, _ONE)
        else:
            add_rms_norm(hidden, before, norm, eps, x, first, end)
    elif part == DO_STORE:
        table, q_size, kv_size = tables[layer], len(q) * q.shape[2], kv_heads * q.shape[2]
        queries, keys, values = (before, _FIRST), (before, q_size), (before, q_size + kv_size)
        store(*queries, *keys, *values, cos[ropes[layer]], sin[ropes[layer]], q, q[:kv_heads], table, first, end)
    elif part == DO_SILU:
        silu_mul(before, x, first, end)
    elif part == DO_ATTEND:
        mixed = x.reshape(rows, len(q), q.shape[2])
        _attend(q_words, tables[layer], items[first:end], windows[layer], kv_heads, score_scale, mixed)
    elif part == DO_MASK:
        _mask(call, x, checks, masked, secrets[c], item, word, scales, expected, verdicts, first, end)
    elif part == DO_ADAPT:  # of the product that is there: the input of its call is still in x
        add_low_rank(x, y_memory[: rows * outer].reshape(rows, outer), adapter_of_row, adapters[c], first, end)
    else:
        y = logits if call[KIND] == LM_HEAD else y_memory[: rows * outer].reshape(rows, outer)
        own = private[thread]
        _unmask(call, y, checks, masked, secrets[c], word, own, scales, expected, verdicts, first, end)


@kernel
def _share(part, c, board, calls, guard, memory, work, room, caches):  # type: ignore[no-untyped-def]
    """All rows of a part of the work, with helpers if they were called."""
    rows = len(caches[2]) if part == DO_ATTEND else calls[c, ROWS]
    if not board[OPEN]:
        _do(part, c, _FIRST, rows, _FIRST, calls, guard, memory, work, room, caches)
        return
    say(board, part, c, rows)
    row = take(board)
    while row >= 0:
        _do(part, c, row, row + 1, _FIRST, calls, guard, memory, work, room, caches)
        done(board)
        row = take(board)
    wait(board)


@kernel
def _help_out(board, thread, calls, guard, memory, work, room, caches):  # type: ignore[no-untyped-def]
    """What a helper does during a step: rows of whatever is to be done, until the step is over."""
    row = next_item(board)
    while row >= 0:
        _do(board[WHAT], board[OF], row, row + 1, thread, calls, guard, memory, work, room, caches)
        done(board)
        row = next_item(board)


@kernel
def _scores(layer, work, caches):  # type: ignore[no-untyped-def]
    """Scores that a layer takes: pairs of query and key, for each head."""
    tables, windows, items = caches[:3]
    scores = _FIRST
    for n in range(len(items)):
        rows, heads = max(items[n, PROMPT_ROWS], _ONE), items[n, END_HEAD] - items[n, FIRST_HEAD]
        scores += rows * heads * min(tables[layer, items[n, SPAN], 4] + rows, windows[layer])
    return scores * (len(work[6]) // work[2])


@kernel
def _call_helpers(c, least, board, calls, work, caches):  # type: ignore[no-untyped-def]
    """Call helpers, if what comes between the answer to call ``c`` and the next call is worth it."""
    after = min(c + 1, len(calls) - 1)
    numbers = calls[c, ROWS] * calls[c, OUTER] + calls[after, ROWS] * calls[after, INNER]
    if calls[after, KIND] == O:
        numbers += _scores(calls[after, LAYER], work, caches)
    if calls[c, ROWS] > 1 and board[HELPERS] and numbers >= least:
        call_helpers(board)


@kernel
def decode(board, thread, at, least, calls, guard, memory, work, room, caches, line):  # type: ignore[no-untyped-def]
    """Go on with a step at ``at``; why it has come back, and the size of the last answer or 0.

    board: of the threads that share rows; helpers are called where ``least`` numbers or more are to be computed. Thread
    0 leads, the others help until the step is over: one function for both, as each would be compiled with all loops.
    The other arguments are tuples; R rows in S spans, W of them whose logits are wanted, k check vectors:

    - guard: whether rows are masked, k, secrets int64 (calls, R, 2): addresses of each row of pads and of products
    - memory: hidden float32 (R, hidden), x and y float32 (any,) for the input and the product of a call, logits float32
      (W, vocabulary), the rows int64 (W,) whose they are, private uint32 (threads, any) for a row of a reply
    - work: epsilon, the scale of scores, KV heads, the greatest number of scores for one thread; cos, sin float32
      (ropes, R, d); q (heads, R, d) of the caches' type, and the same as words
    - room: scales float32 (R,), expected uint32 (R, k), verdicts uint8 (R,), an item of what is sent
    - caches: int64 (layers, S, 5) as ``_attend`` has them, windows int64 (layers,), items of attention, int64 (any, 4),
      and int64 (layers,): whose cos and sin a layer has; as ``add_low_rank`` has them, which adapter each row has int64
      (R,), or (0,) where no row has one, and the tables of all calls
    - line: of ``exchange``, what a good answer begins with, room for an answer; the answer to each call, uint8 (calls,
      SHORT_ANSWER), and its bytes int64 (calls,); uint8 (calls, 1) slow, times int64 (calls, TIMES), int64 (2,) for
      clocks
    """
    if thread > 0:
        _help_out(board, thread, calls, guard, memory, work, room, caches)
        return OVER, 0
    verdicts = room[2]
    socket, good_answer, answer, answers, sizes, slow, times, clock = line
    threads = board[HELPERS] + 1
    while at[CALL] < len(calls):
        c = at[CALL]
        call = calls[c]
        kind, layer = call[KIND], call[LAYER]
        if at[NEXT] == OPERATE:
            times[c, BEGAN] = now(clock)
            if kind == O:
                _share(DO_STORE, c, board, calls, guard, memory, work, room, caches)
                times[c, ROTATED] = now(clock)
                at[NEXT] = MIX
            else:
                times[c, ROTATED] = times[c, BEGAN]
                _share(DO_SILU if kind == DOWN else DO_NORM, c, board, calls, guard, memory, work, room, caches)
                at[NEXT] = ATTENDED
        if at[NEXT] == MIX:
            at[NEXT] = ATTENDED
            if len(caches[2]) < 2 * threads and _scores(layer, work, caches) >= work[3]:
                send_away(board)
                return ATTEND, 0
            _share(DO_ATTEND, c, board, calls, guard, memory, work, room, caches)
        if at[NEXT] == ATTENDED:
            times[c, OPERATED] = now(clock)
            _share(DO_MASK, c, board, calls, guard, memory, work, room, caches)
            send_away(board)
            if not _all_good(verdicts[: call[ROWS]]):
                return REFUSED, 0
            _number(call, at, verdicts)
            times[c, MASKED] = now(clock)
            at[NEXT] = SEND
        if at[NEXT] == SEND:
            packet, size, number = call[PACKET], call[SIZE], at[SEQUENCE]
            verdict, size = exchange(socket, packet, size, number, good_answer, at[ID], answer, slow[c], clock)
            if verdict != ANSWERED:
                return LINE + verdict, size
            sizes[c] = size
            for i in range(size):
                answers[c, i] = answer[i]
            at[NEXT] = TAKE
        times[c, ARRIVED] = now(clock)
        _call_helpers(c, least, board, calls, work, caches)
        _share(DO_UNMASK, c, board, calls, guard, memory, work, room, caches)
        if not _all_good(verdicts[: call[ROWS]]):
            send_away(board)
            return REFUSED, 0
        times[c, CHECKED] = times[c, ADAPTED] = now(clock)
        if len(caches[4]) and kind != LM_HEAD:
            _share(DO_ADAPT, c, board, calls, guard, memory, work, room, caches)
            times[c, ADAPTED] = now(clock)
        at[CALL], at[NEXT], at[SEQUENCE], at[ID] = c + 1, OPERATE, at[SEQUENCE] + 1, at[ID] + 1
    send_away(board)
    return OVER, 0
