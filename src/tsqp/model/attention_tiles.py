"""Tiles of products for attention, in registers: ``compiled_attention.py`` and ``int8_attention.py`` build their loops
of them.

Keys, values and queries are words of 32 bits: two neighbouring bfloat16 numbers (uint32), or one float32. The
instruction ``vdpbf16ps`` multiplies 16 words of two bfloat16 numbers by 16 others, and adds the two products of each to
one of 16 float32 sums. Where the processor lacks it, both halves of a word are widened and multiplied in float32. A
product of two bfloat16 numbers is exact there too, so the ways differ only in how their sums are rounded.

Words may also be two neighbouring integers of 16 bits (int32), where sums are int32. ``vpmaddwd`` multiplies those and
adds neighbours; LLVM makes one ``vpdpwssd`` of it and the addition to a sum where the processor has that. Keys and
values are 8-bit integers there, and become words when a tile loads them. Such sums are exact, and wrap around past 2³¹:
that they stay below is for the caller to see to.

Nothing but the words and their order decides the bits of a sum. Each has one lane of a register and takes its terms one
after another; a score has 16 lanes, which are added in pairs at the end. A tile of fewer rows repeats its last one, and
no row sees another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tsqp.arith.row_tile import function
from tsqp.arith.vnni import features

LANES = 16  # words of a vector
HEADS = 4  # query heads of a decode step that are done at once, and keys
ROWS, VECTORS = (6, 4) if "avx512f" in features() else (3, 2)  # of many queries: such a tile of sums fits the registers
COLUMNS = VECTORS * LANES

HAS_DOT = features() >= {"avx512bf16", "avx512f"}
PAIR_SUMS = 16 if "avx512bw" in features() else 8 if "avx2" in features() else 0  # that one ``vpmaddwd`` makes

_I8, _I16, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_FLOAT, LANES)
_BYTES = 4  # numbers of 8 bits that one lane of 32 bits holds


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """LLVM's own type of bfloat16 numbers, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _halves(b: ir.IRBuilder, words: Any) -> list[Any]:
    """The first and the second number of each word of two, as float32: the upper half of its bits."""
    first = b.shl(words, _splat(16))
    second = b.and_(words, _splat(-65536))
    return [b.bitcast(half, FLOATS) for half in (first, second)]


def _splat(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def add_products(b: ir.IRBuilder, total: Any, x: Any, y: Any) -> Any:
    """total + x·y, lane by lane; a word of two numbers has two products. Sums of integers are of integers."""
    if total.type == _WORDS:
        return _add_integer_products(b, total, x, y)
    if x.type == FLOATS:
        return b.call(function(b, FLOATS, [FLOATS] * 3, "llvm.fmuladd.v16f32"), [x, y, total])
    if HAS_DOT:
        pairs = ir.VectorType(_BFloat16(), 2 * LANES)
        dot = function(b, FLOATS, [FLOATS, pairs, pairs], "llvm.x86.avx512bf16.dpbf16ps.512")
        return b.call(dot, [total, b.bitcast(x, pairs), b.bitcast(y, pairs)])
    for one, other in zip(_halves(b, x), _halves(b, y), strict=True):
        total = add_products(b, total, one, other)
    return total


def _add_integer_products(b: ir.IRBuilder, total: Any, x: Any, y: Any) -> Any:
    numbers = [b.bitcast(vector, ir.VectorType(_I16, 2 * LANES)) for vector in (x, y)]
    return b.add(total, _pair_sums(b, *numbers))


def _pair_sums(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """For each word of two 16-bit integers the sum of their products."""
    if not PAIR_SUMS:
        parts = [_lanes_of(b, [x, y], range(part, 2 * LANES, 2)) for part in (0, 1)]
        return b.add(*(b.mul(*(b.sext(own, _WORDS) for own in part)) for part in parts))
    name = "llvm.x86.avx512.pmaddw.d.512" if PAIR_SUMS == LANES else "llvm.x86.avx2.pmadd.wd"
    numbers, sums = ir.VectorType(_I16, 2 * PAIR_SUMS), ir.VectorType(_I32, PAIR_SUMS)
    add = function(b, sums, [numbers] * 2, name)
    starts = range(0, 2 * LANES, 2 * PAIR_SUMS)
    parts = [b.call(add, _lanes_of(b, [x, y], range(start, start + 2 * PAIR_SUMS))) for start in starts]
    return b.shuffle_vector(parts[0], parts[-1], ir.Constant(_WORDS, list(range(LANES))))


def _lanes_of(b: ir.IRBuilder, vectors: Sequence[Any], lanes: Sequence[int]) -> list[Any]:
    """The same lanes of each vector."""
    chosen = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
    return [b.shuffle_vector(vector, vector, chosen) for vector in vectors]


class _Matrix:
    """An array (rows, width) of words or floats, row after row."""

    def __init__(self, context: Any, b: ir.IRBuilder, kind: Any, value: Any) -> None:
        if kind.layout != "C":
            raise TypeError("these loops need rows one after another")
        array = context.make_array(kind)(context, b, value)
        self._b, self._data = b, array.data
        self.rows, self.width = cgutils.unpack_tuple(b, array.shape)
        self.vector = FLOATS if isinstance(kind.dtype, types.Float) else _WORDS

    def at(self, row: Any, column: Any) -> Any:
        """Where an element lies."""
        return self._b.gep(self._data, [self._b.add(self._b.mul(row, self.width), column)])

    def along(self, place: Any, column: Any) -> Any:
        """Where the element lies that is ``column`` further in the row."""
        return self._b.gep(place, [column])

    def load(self, place: Any) -> Any:
        """A vector of 16 elements from ``place`` on."""
        return self._b.load(self._b.bitcast(place, self.vector.as_pointer()), align=4)

    def load_some(self, place: Any, left: Any) -> Any:
        """The first ``left`` of them, and zeros; not read beyond them."""
        mask = _lanes_below(self._b, range(LANES), left)
        load = function(
            self._b,
            self.vector,
            [self.vector.as_pointer(), _I32, mask.type, self.vector],
            f"llvm.masked.load.v16{'f32' if self.vector == FLOATS else 'i32'}.p0",
        )
        return self._b.call(
            load, [self._b.bitcast(place, self.vector.as_pointer()), _I32(4), mask, ir.Constant(self.vector, None)]
        )

    def repeat(self, place: Any) -> Any:
        """The element at ``place`` in each lane."""
        return _every_lane(self._b, self._b.load(place), self.vector)

    def ask_for(self, place: Any) -> None:
        """Have the cache line at ``place`` read. Safe anywhere: a prefetch reads nothing that a program sees."""
        address = ir.IntType(8).as_pointer()
        ask = function(self._b, ir.VoidType(), [address, _I32, _I32, _I32], "llvm.prefetch.p0")
        self._b.call(ask, [self._b.bitcast(place, address), _I32(0), _I32(2), _I32(1)])  # to read; level 2; data

    def store(self, vector: Any, place: Any) -> None:
        self._b.store(vector, self._b.bitcast(place, vector.type.as_pointer()), align=4)


class _ByteMatrix(_Matrix):
    """An array (rows, width) of 8-bit integers, which are loaded as words of two integers of 16 bits.

    ``width`` and columns count words. Rows are of whole lanes of 32 bits, so that a part of a vector is of whole ones
    too: processors before AVX-512 read no less.
    """

    def __init__(self, context: Any, b: ir.IRBuilder, kind: Any, value: Any) -> None:
        super().__init__(context, b, kind, value)
        self._bytes = self.width
        self.width = b.udiv(self.width, _I64(2))

    def at(self, row: Any, column: Any) -> Any:
        return self._b.gep(self._data, [self._b.add(self._b.mul(row, self._bytes), self._b.mul(column, _I64(2)))])

    def along(self, place: Any, column: Any) -> Any:
        return self._b.gep(place, [self._b.mul(column, _I64(2))])

    def load_some(self, place: Any, left: Any) -> Any:
        b, count = self._b, 2 * LANES // _BYTES
        lanes = ir.VectorType(_I32, count)
        mask = _lanes_below(b, range(0, LANES, 2), left)  # a lane has two words
        load = function(b, lanes, [lanes.as_pointer(), _I32, mask.type, lanes], f"llvm.masked.load.v{count}i32.p0")
        numbers = b.call(load, [b.bitcast(place, lanes.as_pointer()), _I32(1), mask, ir.Constant(lanes, None)])
        wide = b.sext(b.bitcast(numbers, ir.VectorType(_I8, 2 * LANES)), ir.VectorType(_I16, 2 * LANES))
        return b.bitcast(wide, _WORDS)


def _matrices(context: Any, b: ir.IRBuilder, signature: Any, args: Any, which: Sequence[int]) -> list[_Matrix]:
    """Those arguments that are arrays."""

    def one(kind: Any, value: Any) -> _Matrix:
        return (_ByteMatrix if kind.dtype == types.int8 else _Matrix)(context, b, kind, value)

    return [one(signature.args[i], args[i]) for i in which]


def _sums_of(b: ir.IRBuilder, matrix: _Matrix, count: int) -> list[Any]:
    """So many vectors of what the matrix holds, in registers, all 0."""
    zeros = ir.Constant(matrix.vector, None)
    totals = [cgutils.alloca_once_value(b, zeros) for _ in range(count)]
    for total in totals:
        b.store(zeros, total)
    return totals


def _typed_score(_context: Any, q: Any, row: Any, k: Any, first: Any, scores: Any, at: Any, later: Any) -> Any:
    """Four rows of q (rows, ≥ width) from ``row`` on times four rows of k (keys, width) from ``first`` on.

    float32, or int32 of integers, into scores (rows, n) from (row, at) on. What lies in q beyond the width counts for
    nothing, and is there up to a whole vector. The last key stands for those beyond it. Asks for the same rows of
    ``later``, shaped like k.
    """
    return types.void(q, types.int64, k, types.int64, scores, types.int64, later), _emit_score


def _emit_score(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    q, k, scores, later = _matrices(context, b, signature, args, (0, 2, 4, 6))
    row, first, at = args[1], args[3], args[5]
    last = b.sub(k.rows, _I64(1))
    keys = [k.at(_least(b, b.add(first, _I64(j)), last), _I64(0)) for j in range(HEADS)]
    queries = [q.at(b.add(row, _I64(i)), _I64(0)) for i in range(HEADS)]
    totals = _sums_of(b, scores, HEADS * HEADS)
    with _vectors_of(b, k.width) as (column, left):
        own = [k.load_some(k.along(key, column), left) for key in keys]
        for j in range(HEADS):
            later.ask_for(later.at(b.add(first, _I64(j)), column))
        for i, query in enumerate(queries):
            x = q.load(q.along(query, column))
            for total, y in zip(totals[i * HEADS :], own, strict=False):
                b.store(add_products(b, b.load(total), x, y), total)
    sums = _lane_sums(b, [b.load(total) for total in totals])
    for i in range(HEADS):
        lanes = ir.Constant(ir.VectorType(_I32, HEADS), list(range(i * HEADS, (i + 1) * HEADS)))
        scores.store(b.shuffle_vector(sums, sums, lanes), scores.at(b.add(row, _I64(i)), at))
    return context.get_dummy_value()


def _least(b: ir.IRBuilder, one: Any, other: Any) -> Any:
    return b.select(b.icmp_signed("<", one, other), one, other)


@contextmanager
def _vectors_of(b: ir.IRBuilder, width: Any) -> Iterator[tuple[Any, Any]]:
    """A loop over vectors of a row: the first column of each, and how many columns are left, int32."""
    with cgutils.for_range_slice(b, _I64(0), width, _I64(LANES), inc=True) as (column, _):
        yield column, b.trunc(b.sub(width, column), _I32)


def _lanes_below(b: ir.IRBuilder, numbers: Sequence[int], bound: Any) -> Any:
    """Which of these numbers, one for each lane, are less than ``bound``, int32."""
    lanes = ir.VectorType(_I32, len(numbers))
    return b.icmp_signed("<", ir.Constant(lanes, list(numbers)), _every_lane(b, bound, lanes))


def _every_lane(b: ir.IRBuilder, value: Any, kind: Any) -> Any:
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, kind.count), None)
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _lane_sums(b: ir.IRBuilder, vectors: list[Any]) -> Any:
    """As many vectors as lanes: each lane of the result is the sum of one.

    Each round adds lanes that are ``step`` apart, of two vectors at once. Sums of the second one take the lanes that
    those of the first one do not need, so that one of both selections moves no lane and is a cheap blend.
    """
    step = 1
    while len(vectors) > 1:
        stay = ir.Constant(_WORDS, [i + LANES * bool(i & step) for i in range(LANES)])
        move = ir.Constant(_WORDS, [(i ^ step) + LANES * bool(i & step) for i in range(LANES)])
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        add = b.fadd if vectors[0].type == FLOATS else b.add
        vectors = [add(b.shuffle_vector(*pair, stay), b.shuffle_vector(*pair, move)) for pair in pairs]
        step *= 2
    return vectors[0]


def _typed_weigh(
    _context: Any, weights: Any, row: Any, v: Any, first: Any, steps: Any, sums: Any, later: Any, ahead: Any
) -> Any:
    """sums[i] += Σ weights[i]·v for four rows from ``row`` on, over ``steps`` words of weights, keys from ``first`` on.

    weights (rows, ≥ steps): a word of them is of as many neighbouring keys as a word of v (keys, width) is of columns.
    The last key stands for those beyond it. sums (rows, n), float32 or int32 of integers; n holds the columns of whole
    vectors of v. Asks for the rows of ``later`` that lie ``ahead`` of those of v.
    """
    return types.void(weights, types.int64, v, types.int64, types.int64, sums, later, types.int64), _emit_weigh


def _emit_weigh(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    weights, v, sums, later = _matrices(context, b, signature, args, (0, 2, 5, 6))
    row, first, steps = args[1], args[3], args[4]
    numbers = 1 if v.vector == FLOATS else 2  # of a word
    last = b.sub(v.rows, _I64(1))
    rows = [b.add(row, _I64(i)) for i in range(HEADS)]
    totals = [_sums_of(b, sums, numbers) for _ in rows]
    with _vectors_of(b, v.width) as (column, left):
        places = [sums.at(i, b.mul(column, _I64(numbers))) for i in rows]
        for own, place in zip(totals, places, strict=True):
            loaded = [sums.load(b.gep(place, [_I64(LANES * part)])) for part in range(numbers)]
            for total, vector in zip(own, _apart(b, loaded), strict=True):
                b.store(vector, total)
        with cgutils.for_range(b, steps) as loop:
            keys = [b.add(b.add(first, b.mul(loop.index, _I64(numbers))), _I64(j)) for j in range(numbers)]
            words = [v.load_some(v.at(_least(b, key, last), column), left) for key in keys]
            values = words if numbers == 1 else _paired(b, *words)
            for key in keys:
                later.ask_for(later.at(b.add(key, args[7]), column))
            for own, i in zip(totals, rows, strict=True):
                weight = weights.repeat(weights.at(i, loop.index))
                for total, value in zip(own, values, strict=True):
                    b.store(add_products(b, b.load(total), weight, value), total)
        for own, place in zip(totals, places, strict=True):
            for part, vector in enumerate(_together(b, [b.load(total) for total in own])):
                sums.store(vector, b.gep(place, [_I64(LANES * part)]))
    return context.get_dummy_value()


def _paired(b: ir.IRBuilder, one: Any, other: Any) -> list[Any]:
    """Words of two rows as words of their first numbers, and of their second numbers."""
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    rows = [b.bitcast(row, halves) for row in (one, other)]
    lanes = ir.VectorType(_I32, 2 * LANES)
    chosen = [[i + part if i % 2 == 0 else 2 * LANES + i - 1 + part for i in range(2 * LANES)] for part in (0, 1)]
    return [b.bitcast(b.shuffle_vector(*rows, ir.Constant(lanes, own)), _WORDS) for own in chosen]


def _apart(b: ir.IRBuilder, vectors: list[Any]) -> list[Any]:
    """Two neighbouring vectors as their even and their odd lanes; one as it is."""
    return vectors if len(vectors) == 1 else _shuffled(b, vectors, [range(i, 2 * LANES, 2) for i in (0, 1)])


def _together(b: ir.IRBuilder, vectors: list[Any]) -> list[Any]:
    """The inverse of ``_apart``."""
    if len(vectors) == 1:
        return vectors
    turns = [[i // 2 + LANES * (i % 2) for i in range(half, half + LANES)] for half in (0, LANES)]
    return _shuffled(b, vectors, turns)


def _shuffled(b: ir.IRBuilder, vectors: list[Any], lanes: Sequence[Sequence[int]]) -> list[Any]:
    return [b.shuffle_vector(*vectors, ir.Constant(_WORDS, list(one))) for one in lanes]


def _typed_multiply(_context: Any, x: Any, first: Any, rows: Any, panel: Any, steps: Any, out: Any, at: Any) -> Any:
    """``rows`` (at most ``ROWS``) rows of x (n, width) from ``first`` on times ``steps`` rows of a packed panel.

    The panel (≥ steps, COLUMNS) has one row for each word of x. float32, or int32 of integers, into out (≥ rows, m),
    columns from ``at`` on.
    """
    return types.void(x, types.int64, types.int64, panel, types.int64, out, types.int64), _emit_multiply


def _emit_multiply(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    x, panel, out = _matrices(context, b, signature, args, (0, 3, 5))
    first, rows, steps, at = args[1], args[2], args[4], args[6]
    last = b.sub(rows, _I64(1))
    used = [_least(b, _I64(i), last) for i in range(ROWS)]
    starts = [x.at(b.add(first, i), _I64(0)) for i in used]
    totals = [_sums_of(b, out, VECTORS) for _ in range(ROWS)]
    with cgutils.for_range(b, steps) as loop:
        place = panel.at(loop.index, _I64(0))
        columns = [panel.load(b.gep(place, [_I64(LANES * i)])) for i in range(VECTORS)]
        for own, start in zip(totals, starts, strict=True):
            term = x.repeat(b.gep(start, [loop.index]))
            for total, column in zip(own, columns, strict=True):
                b.store(add_products(b, b.load(total), term, column), total)
    for i, own in zip(used, totals, strict=True):
        for j, total in enumerate(own):
            out.store(b.load(total), out.at(i, b.add(at, _I64(LANES * j))))
    return context.get_dummy_value()


score_tile: Any = intrinsic(_typed_score)
weigh_tile: Any = intrinsic(_typed_weigh)
multiply_tile: Any = intrinsic(_typed_multiply)
