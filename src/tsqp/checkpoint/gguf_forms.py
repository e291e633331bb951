"""How GGUF stores the numbers of a tensor: floats, or blocks of few bits that the ``gguf`` package dequantises.

A form is one that the installed package knows and dequantises: there is no list of them here. Rows are dequantised a
range at a time, by all threads; for the forms of the commonest files compiled loops give the same bits sooner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

Rows = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

_FLOATS = ("F32", "F16", "BF16")
_WORTH_COMPILING = 1 << 20  # numbers at a time: less is dequantised sooner by the package


@dataclass(frozen=True)
class Form:
    """One way to store numbers, named as GGML does: ``block`` numbers of a row take ``size`` bytes."""

    name: str
    number: int
    block: int
    size: int

    @property
    def is_float(self) -> bool:
        """Whether numbers are kept as they are stored."""
        return self.name in _FLOATS

    def bytes_of(self, count: int) -> int:
        """How many bytes so many numbers take; they must be whole blocks."""
        return count // self.block * self.size


@cache
def form_of(number: int) -> Form | None:
    """The form that GGML has under a number; None where the package does not know it, or cannot read it."""
    try:
        kind = GGMLQuantizationType(number)
        form = Form(kind.name, number, *GGML_QUANT_SIZES[kind])
        if not form.is_float:
            dequantize(np.zeros((1, form.size), np.uint8), kind)  # which of them it can is written nowhere else
    except (ValueError, KeyError, NotImplementedError):
        return None
    return form


def form_name(number: int) -> str:
    """How GGML calls a form, or its number where the package has none."""
    try:
        return str(GGMLQuantizationType(number).name)
    except ValueError:
        return f"type {number}"


def dequantised(form: Form, rows: Rows) -> Floats:
    """Rows of blocks as the float32 numbers (rows, row length) that they stand for."""
    from tsqp.arith.row_threads import least_rows, row_threads

    count, width = len(rows), rows.shape[1] // form.size * form.block
    out = np.empty((count, width), np.float32)
    loop = _loop(form.name) if out.size >= _WORTH_COMPILING else None
    if loop is None:
        row_threads().run(_by_the_package, count, form, rows, out, least=least_rows(width))
    else:
        row_threads().run(loop, count, rows, out, least=least_rows(width))
    return out


def _by_the_package(form: Form, rows: Rows, out: Floats, first: int, end: int) -> None:
    with np.errstate(all="ignore"):  # a scale may be infinite: whoever takes the numbers looks whether they are finite
        out[first:end] = dequantize(rows[first:end], GGMLQuantizationType(form.number))


def _loop(name: str) -> Callable[..., Any] | None:
    from tsqp.checkpoint.gguf_loops import LOOPS

    return LOOPS.get(name)
