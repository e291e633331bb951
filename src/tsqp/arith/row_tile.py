"""A tile of products for compiled loops: some rows of x times some rows of weights, each sum in a register.

Rows are bytes, whatever numbers they hold. An instruction takes a vector of bytes from both and adds the products of
each 4 bytes to one of its lanes, which are sums of 32 bits: ``vpdpbusd`` for digits, ``vdpbf16ps`` for bfloat16.
Weights are loaded once for all rows of x, and the rows that come next are asked for meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))

AddProducts = Callable[[ir.IRBuilder, Any, Any, Any], Any]  # builder, sums, bytes of x, bytes of weights: new sums


def emitter(x_rows: int, w_rows: int, vector: int, lanes: ir.VectorType, add_products: AddProducts) -> Any:
    """What numba calls to write the tile of an intrinsic (x, first_x, w, first_w, sums).

    x (M, K), w (N, K) bytes and sums (x_rows, w_rows): arrays, contiguous. Whole vectors of ``vector`` bytes of K are
    multiplied, and what is left of K is not. The last row stands for those beyond it, so that nothing else is read.
    There are as many sums as ``lanes``: in the end they are one vector.
    """
    if x_rows * w_rows * 4 != vector:
        raise ValueError(f"{x_rows} times {w_rows} sums are not the lanes of {vector} bytes")

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x, w, sums = (context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 2, 4))
        inner = cgutils.unpack_tuple(b, x.shape)[1]
        totals = [cgutils.alloca_once_value(b, ir.Constant(lanes, None)) for _ in range(x_rows * w_rows)]
        own, weights = _row_starts(b, x, args[1], x_rows), _row_starts(b, w, args[3], w_rows)

        with cgutils.for_range(b, b.udiv(inner, _I64(vector))) as loop:
            at = b.mul(loop.index, _I64(vector))
            loaded = [_load(b, row, at, vector) for row in weights]
            with b.if_then(b.icmp_signed("==", args[1], _I64(0))):  # once for each row of weights
                _prefetch(b, weights, b.add(at, b.mul(inner, _I64(w_rows))))
            for i, row in enumerate(own):
                numbers = _load(b, row, at, vector)
                for total, weight in zip(totals[i * w_rows :], loaded, strict=False):
                    b.store(add_products(b, b.load(total), numbers, weight), total)

        vectors = [b.load(total) for total in totals]
        while len(vectors) > 1:  # as many vectors as lanes: in the end one vector, and each lane the sum of one
            vectors = [_neighbours_added(b, *vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
        b.store(vectors[0], b.bitcast(sums.data, lanes.as_pointer()), align=4)
        return context.get_dummy_value()

    return emit


def function(b: ir.IRBuilder, result: Any, arguments: list[Any], name: str) -> Any:
    """One of LLVM's own functions."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _row_starts(b: ir.IRBuilder, matrix: Any, first: Any, count: int) -> list[Any]:
    """Where ``count`` rows from ``first`` on begin: none beyond the last."""
    rows, width = cgutils.unpack_tuple(b, matrix.shape)
    last = b.sub(rows, _I64(1))
    wanted = [b.add(first, _I64(i)) for i in range(count)]
    return [b.gep(matrix.data, [b.mul(b.select(b.icmp_signed("<", row, last), row, last), width)]) for row in wanted]


def _load(b: ir.IRBuilder, row: Any, at: Any, vector: int) -> Any:
    words = ir.VectorType(_I32, vector // 4)
    return b.load(b.bitcast(b.gep(row, [at]), words.as_pointer()), align=1)


def _prefetch(b: ir.IRBuilder, rows: list[Any], at: Any) -> None:
    """Ask for the rows that come next, into the second cache: short rows end before the processor would guess them.

    Safe beyond the end of the matrix: a prefetch reads nothing that a program sees, and raises no fault.
    """
    ask = function(b, ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32], "llvm.prefetch.p0")
    for row in rows:
        b.call(ask, [b.gep(row, [at]), _I32(0), _I32(2), _I32(1)])  # to read; level 2; data


def _neighbours_added(b: ir.IRBuilder, left: Any, right: Any) -> Any:
    """Each two neighbouring lanes of both vectors, added."""
    count = left.type.count
    kind = ir.VectorType(_I32, count)
    even, odd = (ir.Constant(kind, list(range(i, 2 * count, 2))) for i in (0, 1))
    pairs = [b.shuffle_vector(left, right, which) for which in (even, odd)]
    return b.fadd(*pairs) if left.type.element == ir.FloatType() else b.add(*pairs)
