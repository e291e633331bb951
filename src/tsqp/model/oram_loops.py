"""One access of a Circuit ORAM (Wang, Chan and Shi 2015, algorithms 4 to 6), without branches on what is secret.

Slots are those of a stash, then those of the nodes of a binary tree, ``per_node`` each, the root first. Each slot has
an id (-1: it is empty), a leaf, and a row of words. A row is in the stash or on the path to its leaf. Indices of memory
depend on sizes and on the leaf that is read, which is drawn at random anew for each access and used once.
"""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import inline, kernel

NONE = np.int64(-1)
ALL = np.int64(-1)


@inline
def _mask(condition):  # type: ignore[no-untyped-def]
    """All bits where it holds, else none."""
    return -np.int64(condition)


@inline
def _either(mask, one, other):  # type: ignore[no-untyped-def]
    return (one & mask) | (other & ~mask)


@inline
def _common_levels(leaf, path, depth):  # type: ignore[no-untyped-def]
    """How many edges of the tree the ways to two leaves have in common, 0 to depth."""
    differing, length = leaf ^ path, np.int64(0)
    for bit in range(depth):
        length += np.int64((differing >> bit) != 0)
    return depth - length


@inline
def _bucket(level, path, depth, stash, per_node):  # type: ignore[no-untyped-def]
    """Level 0 is the stash, level 1 the root: the first slot of a bucket, and how many it has."""
    if level == 0:
        return 0, stash
    node = (np.int64(1) << (level - 1)) - 1 + (path >> (depth - (level - 1)))
    return stash + node * per_node, per_node


@kernel
def new_position(positions, token, fresh):  # type: ignore[no-untyped-def]
    """The leaf of a token, which is ``fresh`` from now on. Every position is read and written."""
    found = np.int32(0)
    for one in range(positions.shape[0]):
        mask = np.int32(-np.int32(one == token))
        here = positions[one]
        found |= here & mask
        positions[one] = (here & ~mask) | (np.int32(fresh) & mask)
    return found


@kernel
def take_out(ids, words, token, path, depth, stash, per_node, out, room):  # type: ignore[no-untyped-def]
    """Move the row of a token from the stash or a path into ``out`` (W,), which is 0 before. A mask: was it there?"""
    found = np.int64(0)
    for level in range(depth + 2):
        first, count = _bucket(level, path, depth, stash, per_node)
        for at in range(count):
            room[6, at] = _mask(ids[first + at] == token)
            ids[first + at] |= room[6, at]
            found |= room[6, at]
        for at in range(count):
            mask = room[6, at]  # as a number from memory, no compiler makes a branch of it
            for i in range(out.shape[0]):
                out[i] |= words[first + at, i] & mask
    return found


@kernel
def put_in(ids, leaves, words, token, leaf, stash, row, room):  # type: ignore[no-untyped-def]
    """Put a row into the first empty slot of the stash. Whether there was one."""
    missing = ALL
    for slot in range(stash):
        mask = _mask(ids[slot] == NONE) & missing
        missing &= ~mask
        ids[slot] = _either(mask, np.int64(token), ids[slot])
        leaves[slot] = _either(mask, np.int64(leaf), leaves[slot])
        room[6, slot] = mask
    for slot in range(stash):
        mask = room[6, slot]
        for i in range(row.shape[0]):
            words[slot, i] = _either(mask, row[i], words[slot, i])
    return missing == 0


@kernel
def evict(ids, leaves, words, path, depth, stash, per_node, held, room):  # type: ignore[no-untyped-def]
    """Move rows of the stash and of one path as far down that path as they may be: one pass, one row in the hand.

    held (W,), room (8, at least depth + 2, and stash or per_node), int64: to work in.
    """
    levels = depth + 2
    deepest, target, reach, chosen, empty = room[1], room[2], room[3], room[4], room[5]
    for level in range(levels):  # of each bucket: how deep its deepest row may go, which slot that is, if one is empty
        first, count = _bucket(level, path, depth, stash, per_node)
        best, slot_of, has_empty = NONE, NONE, np.int64(0)
        for slot in range(first, first + count):
            there = _mask(ids[slot] != NONE)
            may = _either(there, _common_levels(leaves[slot], path, depth) + 1, NONE)
            better = _mask(may > best)
            best, slot_of = _either(better, may, best), _either(better, np.int64(slot), slot_of)
            has_empty |= ~there
        reach[level], chosen[level], empty[level] = best, slot_of, has_empty
    source, goal = NONE, NONE
    for level in range(levels):  # from which bucket above the row comes that may go as deep as here
        deepest[level] = _either(_mask(goal >= level), source, NONE)
        better = _mask(reach[level] > goal)
        goal, source = _either(better, reach[level], goal), _either(better, np.int64(level), source)
    source, goal = NONE, NONE
    for back in range(levels):  # which of these moves are made, from the leaf upwards
        level = levels - 1 - back
        leaves_here = _mask(source == level)
        target[level] = _either(leaves_here, goal, NONE)
        goal, source = _either(leaves_here, NONE, goal), _either(leaves_here, NONE, source)
        fits = (_mask(goal == NONE) & empty[level]) | _mask(target[level] != NONE)
        comes = fits & _mask(deepest[level] != NONE)
        goal, source = _either(comes, np.int64(level), goal), _either(comes, deepest[level], source)
    held_id, held_leaf, goal = NONE, np.int64(0), NONE
    held[:] = 0
    for level in range(levels):
        first, count = _bucket(level, path, depth, stash, per_node)
        arrives = _mask(goal == level) & _mask(held_id != NONE)
        goes = _mask(target[level] != NONE)
        wanting = arrives
        new_id, new_leaf = _either(arrives, NONE, held_id), held_leaf
        for at in range(count):
            slot = first + at
            out = goes & _mask(chosen[level] == slot)
            new_id, new_leaf = _either(out, ids[slot], new_id), _either(out, leaves[slot], new_leaf)
            ids[slot] |= out
            into = wanting & _mask(ids[slot] == NONE)
            wanting &= ~into
            ids[slot], leaves[slot] = _either(into, held_id, ids[slot]), _either(into, held_leaf, leaves[slot])
            room[6, at], room[7, at] = out, into
        goal = _either(goes, target[level], _either(arrives, NONE, goal))
        held_id, held_leaf = new_id, new_leaf
        room[0, 0] = ~arrives
        _move(words, first, count, held, room)


@inline
def _move(words, first, count, held, room):  # type: ignore[no-untyped-def]
    """The words of one bucket: those that arrive are in ``held``, those that leave are afterwards."""
    stays = room[0, 0]
    for i in range(held.shape[0]):
        arriving = held[i]
        leaving = arriving & stays
        for at in range(count):
            here = words[first + at, i]
            leaving |= here & room[6, at]
            words[first + at, i] = (here & ~room[7, at]) | (arriving & room[7, at])
        held[i] = leaving


@kernel
def put_back(ids, leaves, words, token, leaf, paths, depth, stash, per_node, row, held, room):  # type: ignore[no-untyped-def]
    """Put a row into the stash, then evict along ``paths``. Whether there was room for it."""
    fitted = put_in(ids, leaves, words, token, leaf, stash, row, room)
    for i in range(paths.shape[0]):
        evict(ids, leaves, words, paths[i], depth, stash, per_node, held, room)
    return fitted


@kernel
def access(ids, leaves, words, positions, token, fresh, paths, depth, stash, per_node, row, held, room):  # type: ignore[no-untyped-def]
    """Take the row of a token, put it back with the leaf ``fresh``: whether it was there, and whether it is again.

    One call, which no signal ends: whatever came in between would lose the row. What was not found is not put back.
    """
    row[:] = 0
    leaf = new_position(positions, token, fresh)
    found = take_out(ids, words, token, leaf, depth, stash, per_node, row, room)
    kept = np.int64(token) | ~found
    return found != 0, put_back(ids, leaves, words, kept, fresh, paths, depth, stash, per_node, row, held, room)
