"""Blocks of the commonest forms of GGUF to float32, in one pass: the numbers of ``gguf.dequantize`` to the bit.

Each loop takes rows of blocks, uint8 (rows, bytes), and writes rows ``first`` to ``end`` of float32 (rows, numbers).
The layouts are those of GGML's ``block_q4_0``, ``block_q8_0``, ``block_q4_K``, ``block_q5_K`` and ``block_q6_K``. Each
product and each difference is rounded on its own, as numpy's are: nothing is fused.
"""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import inline, kernel


@inline
def _half(low, high):  # type: ignore[no-untyped-def]
    """The float16 of two bytes, as float32."""
    bits = np.uint32(low) | np.uint32(high) << np.uint32(8)
    sign, magnitude = (bits & np.uint32(0x8000)) << np.uint32(16), bits & np.uint32(0x7FFF)
    if magnitude >= np.uint32(0x7C00):  # infinite, or no number
        return np.uint32(sign | np.uint32(0x7F800000) | (magnitude & np.uint32(0x3FF)) << np.uint32(13)).view(
            np.float32
        )
    # Moved to where float32 has them, exponent and fraction are those of the number times 2^-112, subnormals too.
    return np.uint32(sign | magnitude << np.uint32(13)).view(np.float32) * np.float32(2.0**112)


@inline
def _scale(packed, i):  # type: ignore[no-untyped-def]
    """The 6 bits of scale i of 8, of the 12 bytes that K forms of 4 and 5 bits have."""
    return packed[i] & 63 if i < 4 else (packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4


@inline
def _least(packed, i):  # type: ignore[no-untyped-def]
    """The 6 bits of minimum i of 8."""
    return packed[i + 4] & 63 if i < 4 else packed[i + 4] >> 4 | (packed[i] >> 6) << 4


@kernel
def q4_0(rows, out, first, end):  # type: ignore[no-untyped-def]
    for row in range(first, end):
        for block in range(rows.shape[1] // 18):
            stored, y = rows[row, block * 18 : block * 18 + 18], out[row, block * 32 : block * 32 + 32]
            d = _half(stored[0], stored[1])
            for i in range(16):
                y[i] = d * np.float32(np.int32(stored[2 + i] & 15) - np.int32(8))
                y[16 + i] = d * np.float32(np.int32(stored[2 + i] >> 4) - np.int32(8))


@kernel
def q8_0(rows, out, first, end):  # type: ignore[no-untyped-def]
    for row in range(first, end):
        for block in range(rows.shape[1] // 34):
            stored, y = rows[row, block * 34 : block * 34 + 34], out[row, block * 32 : block * 32 + 32]
            d = _half(stored[0], stored[1])
            for i in range(32):
                y[i] = d * np.float32(np.int8(stored[2 + i]))


@kernel
def q4_k(rows, out, first, end):  # type: ignore[no-untyped-def]
    for row in range(first, end):
        for block in range(rows.shape[1] // 144):
            stored, y = rows[row, block * 144 : block * 144 + 144], out[row, block * 256 : block * 256 + 256]
            d, d_min = _half(stored[0], stored[1]), _half(stored[2], stored[3])
            packed = stored[4:16]
            for pair in range(4):  # of 32 numbers in low bits and 32 in high ones
                low, high = d * np.float32(_scale(packed, 2 * pair)), d * np.float32(_scale(packed, 2 * pair + 1))
                low_min = d_min * np.float32(_least(packed, 2 * pair))
                high_min = d_min * np.float32(_least(packed, 2 * pair + 1))
                for i in range(32):
                    byte = stored[16 + 32 * pair + i]
                    y[64 * pair + i] = low * np.float32(byte & 15) - low_min
                    y[64 * pair + 32 + i] = high * np.float32(byte >> 4) - high_min


@kernel
def q5_k(rows, out, first, end):  # type: ignore[no-untyped-def]
    for row in range(first, end):
        for block in range(rows.shape[1] // 176):
            stored, y = rows[row, block * 176 : block * 176 + 176], out[row, block * 256 : block * 256 + 256]
            d, d_min = _half(stored[0], stored[1]), _half(stored[2], stored[3])
            packed = stored[4:16]
            for pair in range(4):
                low, high = d * np.float32(_scale(packed, 2 * pair)), d * np.float32(_scale(packed, 2 * pair + 1))
                low_min = d_min * np.float32(_least(packed, 2 * pair))
                high_min = d_min * np.float32(_least(packed, 2 * pair + 1))
                for i in range(32):
                    byte, fifth = stored[48 + 32 * pair + i], stored[16 + i] >> (2 * pair)
                    y[64 * pair + i] = low * np.float32(byte & 15 | (fifth & 1) << 4) - low_min
                    y[64 * pair + 32 + i] = high * np.float32(byte >> 4 | (fifth & 2) << 3) - high_min


@kernel
def q6_k(rows, out, first, end):  # type: ignore[no-untyped-def]
    for row in range(first, end):
        for block in range(rows.shape[1] // 210):
            stored, y = rows[row, block * 210 : block * 210 + 210], out[row, block * 256 : block * 256 + 256]
            d = _half(stored[208], stored[209])
            for half in range(2):  # of 128 numbers
                low, high = stored[64 * half : 64 * half + 64], stored[128 + 32 * half : 160 + 32 * half]
                for part in range(2):  # of 16 that have a scale, four times
                    scales = stored[192 + 8 * half + part : 200 + 8 * half]
                    d0, d1 = d * np.float32(np.int8(scales[0])), d * np.float32(np.int8(scales[2]))
                    d2, d3 = d * np.float32(np.int8(scales[4])), d * np.float32(np.int8(scales[6]))
                    for i in range(16 * part, 16 * part + 16):
                        bits, at = np.int32(high[i]), 128 * half + i
                        y[at] = d0 * np.float32((low[i] & 15 | (bits & 3) << 4) - 32)
                        y[at + 32] = d1 * np.float32((low[i + 32] & 15 | (bits >> 2 & 3) << 4) - 32)
                        y[at + 64] = d2 * np.float32((low[i] >> 4 | (bits >> 4 & 3) << 4) - 32)
                        y[at + 96] = d3 * np.float32((low[i + 32] >> 4 | (bits >> 6) << 4) - 32)


LOOPS = {"Q4_0": q4_0, "Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
