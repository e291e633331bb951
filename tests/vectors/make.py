"""Writes guard.json: ``python -m tests.vectors.make``. Test vectors of docs/masking.md, made by the package's code.

float32 numbers are the hex of their bits, bytes are hex, integers are integers. ``verify.py`` recomputes all of it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsqp.arith.digits_torch import join_torch, split_torch
from tsqp.arith.expand import AesKeyStream, expand
from tsqp.arith.field import MAX_SMALL, Digits, FieldWeights
from tsqp.arith.modulus import MAX_CENTRED, P
from tsqp.arith.quantise import quantise_rows
from tsqp.arith.self_test import exact_product, pick_kernel

FILE = Path(__file__).with_name("guard.json")
LEAST_SCALE = np.float32(2.0**-126)

Array = np.ndarray[Any, np.dtype[Any]]
Case = dict[str, dict[str, Any]]


def vectors() -> dict[str, list[Case]]:
    """All sections, the same whenever and wherever they are made."""
    return {
        "quantise": quantise_cases(),
        "limit": limit_cases(),
        "product": product_cases(),
        "masked": masked_cases(),
        "check": check_cases(),
        "expand": expand_cases(),
        "ratchet": [ratchet_case(key_of("root"), 3)],
    }


def text() -> str:
    """The file: one line for each case."""
    sections = [
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, cases)) + "\n]" for name, cases in vectors().items()
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


# Inputs, from names: no generator's stream is the same for ever.


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def uniform(name: str, *shape: int) -> Array:
    """Elements of F_p."""
    out = np.empty(shape, np.uint32)
    expand(AesKeyStream(key_of(name)), out)
    return out.astype(np.int64)


def integers(name: str, largest: int, *shape: int) -> Array:
    """From -largest to largest."""
    return uniform(name, *shape) % (2 * largest + 1) - largest


def reals(name: str, *shape: int) -> Array:
    """float32, about from -4 to 4."""
    return (uniform(name, *shape) - MAX_CENTRED).astype(np.float32) / np.float32(2**28)


def hexes(values: Array) -> Any:
    """float32 numbers of any shape as nested lists of hex."""
    return np.vectorize(lambda value: struct.pack(">f", value).hex(), otypes=[object])(values).tolist()


# §1


def activations(x: Array, q_max: int) -> tuple[Array, Array]:
    """The formula of §1: digits int64, scales float32."""
    scales = np.abs(x).max(axis=1) / np.float32(q_max)
    scales = np.where(scales < LEAST_SCALE, np.float32(1), scales)
    digits = np.clip(np.rint(x / scales[:, None]), -q_max, q_max)
    return digits.astype(np.int64), scales


def quantise_cases() -> list[Case]:
    tiny, least = np.float32(2.0**-149), np.float32(2.0**-126)
    ties = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    edges = np.array(
        [
            [0.0, -0.0, 0.0],
            [tiny, -tiny, 0.0],
            [least * 126, least, -least],  # the scale would be below the least normal number
            [least * 128, least, -least],
            [3.0e38, -3.0e38, 1.0],
            [1.0, -1.0, 1 / 3],
        ],
        np.float32,
    )
    tied = np.array([[MAX_SMALL, 0.5, 1.5, -2.5, 32638.5]], np.float32)
    weights = [weights_case(x) for x in (ties, edges, reals("weights", 4, 9))]
    inputs = [(edges, MAX_SMALL), (tied, MAX_SMALL), (reals("x", 3, 8), MAX_SMALL), (reals("x few", 3, 8), 127)]
    return weights + [activations_case(x, q_max) for x, q_max in inputs]


def weights_case(w: Array) -> Case:
    digits, scales = quantise_rows(torch.from_numpy(w))
    return quantised(w, 127, digits.numpy(), scales.numpy())


def activations_case(x: Array, q_max: int) -> Case:
    return quantised(x, q_max, *activations(x, q_max))


def quantised(x: Array, levels: int, digits: Array, scales: Array) -> Case:
    return {"in": {"x": hexes(x), "levels": levels}, "out": {"digits": digits.tolist(), "scales": hexes(scales)}}


def limit(norm: int) -> int:
    return min(MAX_SMALL, MAX_CENTRED // norm) if norm else MAX_SMALL


def limit_cases() -> list[Case]:
    bends = (MAX_CENTRED // MAX_SMALL, MAX_CENTRED // 127)  # where two digits, and where 8 bits, are just possible
    norms = [0, 1, 2048 * 127, 132_104 * 127] + [norm + step for norm in bends for step in (0, 1)]
    return [{"in": {"norm": norm}, "out": {"q_max": limit(norm), "refused": limit(norm) < 127}} for norm in norms]


# §2


def product_cases() -> list[Case]:
    edges = [0, 1, P - 1, MAX_CENTRED, MAX_CENTRED + 1, 127, 128, 255, 256, P - 128, P - 129, 0x00808080]
    small = [0, 1, -1, 127, 128, -128, -129, MAX_SMALL, -MAX_SMALL, 255, 256, -256]
    wq = integers("wq", 127, 3, 12)
    extreme = np.full((2, 12), 127)
    extreme[1] = -127
    field = np.stack([np.array(edges), uniform("row", 12)])
    clear = np.stack([np.array(small), integers("clear row", MAX_SMALL, 12)])
    inputs: list[tuple[Array, Digits]] = [(field, 4), (clear, 2)]
    return [product_case(x, w, digits) for x, digits in inputs for w in (wq, extreme)]


def product_case(x: Array, wq: Array, digits: Digits) -> Case:
    w = torch.from_numpy(wq).to(torch.int8)
    narrow = torch.from_numpy(x).to(torch.int32 if digits == 4 else torch.int16)
    split = split_torch(narrow, digits).to(torch.int16) - 128
    kernel = pick_kernel(torch.device("cpu"))
    sums = exact_product(kernel, split.to(torch.int8).flatten(0, 1), w).view(digits, len(x), -1)
    y = worker_product(x, wq, digits)
    if not np.array_equal(y, join_torch(sums, torch.zeros(len(wq), dtype=torch.int32)).numpy()):
        raise ValueError("the two products of the package differ: no vectors can be made of them")
    given = {"x": x.tolist(), "wq": wq.tolist(), "digits": digits}
    return {"in": given, "out": {"split": split.tolist(), "sums": sums.tolist(), "y": y.tolist()}}


def worker_product(x: Array, wq: Array, digits: Digits) -> Array:
    """What an honest worker answers, int64."""
    weights = FieldWeights.of(torch.from_numpy(wq).to(torch.int8), pick_kernel(torch.device("cpu")))
    y = torch.empty(len(x), len(wq), dtype=torch.int32)
    weights.product(torch.from_numpy(x).to(torch.int32 if digits == 4 else torch.int16), digits, out=y)
    return y.numpy().astype(np.int64)


# §3


def masked_cases() -> list[Case]:
    wide = reals("w wide", 2, 12) * np.array([[1.0], [1e-3]], np.float32)
    return [
        masked_case(reals("x masked", 2, 6), reals("w masked", 4, 6), reals("b", 4), "pad"),
        masked_case(np.ones((1, 12), np.float32), wide, np.zeros(2, np.float32), "wide pad"),
    ]


def masked_case(x: Array, w: Array, b: Array, pad: str) -> Case:
    digits, s_w = quantise_rows(torch.from_numpy(w))
    wq = digits.numpy().astype(np.int64)
    xq, s_x = activations(x, limit(int(np.abs(wq).sum(axis=1).max())))
    r = uniform(pad, *x.shape)
    masked = (xq + r) % P
    y, undo = worker_product(masked, wq, 4), worker_product(r, wq, 4)
    exact = (y - undo + MAX_CENTRED) % P - MAX_CENTRED
    result = exact.astype(np.float32) * s_x[:, None] * s_w.numpy() + b
    given = {"xq": xq.tolist(), "r": r.tolist(), "wq": wq.tolist()}
    given |= {"s_x": hexes(s_x), "s_w": hexes(s_w.numpy()), "b": hexes(b)}
    integers = {"x": masked.tolist(), "y": y.tolist(), "undo": undo.tolist(), "exact": exact.tolist()}
    return {"in": given, "out": {**integers, "result": hexes(result)}}


# §4


def check_cases() -> list[Case]:
    wq, s = integers("wq check", 127, 4, 6), uniform("s", 2, 4)
    x, clear = uniform("x check", 2, 6), integers("x clear", MAX_SMALL, 2, 6)
    x[0], clear[0] = 0, 0  # a row whose product is zero: p instead of 0 is the same number written otherwise
    right, exact = worker_product(x, wq, 4), worker_product(clear, wq, 2)
    signed = (clear @ wq.T) % 2**32  # the integers themselves, as their bits are
    blind = (right + np.array([[0, 0, 0, 0], [int(s[0, 1]), P - int(s[0, 0]), 0, 0]])) % P  # orthogonal to the first s
    replies = [
        (x, right, "accept"),
        (x, right ^ single(1, 2, 1), "ProductMismatch"),
        (x, right ^ single(1, 3, 1 << 31), "ReplyRangeError"),
        (x, right + single(1, 0, P), "ReplyRangeError"),
        (x, right + single(0, 0, P), "ReplyRangeError"),
        (x, right[::-1], "ProductMismatch"),
        (x, blind, "ProductMismatch"),  # one vector would accept it
        (clear, exact, "accept"),
        (clear, exact ^ single(1, 1, 1), "ProductMismatch"),
        (clear, exact + single(0, 3, P), "ReplyRangeError"),
        (clear, signed, "ReplyRangeError"),
    ]
    return [check_case(inputs, wq, s, y, verdict) for inputs, y, verdict in replies]


def single(row: int, column: int, value: int) -> Array:
    change = np.zeros((2, 4), np.int64)
    change[row, column] = value
    return change


def check_case(x: Array, wq: Array, s: Array, y: Array, verdict: str) -> Case:
    """The verdict is the class of the error, as it is expected, not computed."""
    w_s = s.astype(object) @ wq.astype(object) % P
    given = {"x": x.tolist(), "wq": wq.tolist(), "s": s.tolist(), "y": y.tolist()}
    return {"in": given, "out": {"w_s": w_s.tolist(), "verdict": verdict}}


# §5


class MadeUpStream:
    """A key stream of chosen bytes."""

    def __init__(self, stream: bytes) -> None:
        self._left = memoryview(stream)

    def fill(self, place: memoryview) -> None:
        place[:] = self._left[: len(place)]
        self._left = self._left[len(place) :]


def expand_cases() -> list[Case]:
    top = 1 << 31  # what is cleared
    words = [5, P, top | 7, top | P, P - 1, 0, P, top | 11, P, top | P, 13, 17, 19]  # seven elements, three of them p
    stream = np.array(words, "<u4").tobytes()
    keys = [(bytes(32), 20), (key_of("pad"), 20), (key_of("long"), 16 * 80)]  # the last counts past 256 blocks
    cases = [expand_case({"key": key.hex()}, AesKeyStream(key), n) for key, n in keys]
    return [*cases, expand_case({"stream": stream.hex()}, MadeUpStream(stream), 7)]


def expand_case(source: dict[str, str], stream: AesKeyStream | MadeUpStream, n: int) -> Case:
    out, after = np.empty(n, np.uint32), np.empty(1, np.uint32)
    expand(stream, out)
    expand(stream, after)  # the stream goes on where the elements ended
    digest = hashlib.sha256(out.astype("<u4").tobytes()).hexdigest()
    return {"in": {"n": n, **source}, "out": {"first": out[:20].tolist(), "sha256": digest, "next": int(after[0])}}


def ratchet_case(root: bytes, steps: int) -> Case:
    state, states, keys = root, [], []
    for _ in range(steps):
        stream = bytearray(64)
        AesKeyStream(state).fill(memoryview(stream))
        state = bytes(stream[:32])
        states.append(state.hex())
        keys.append(stream[32:].hex())
    return {"in": {"root": root.hex(), "steps": steps}, "out": {"states": states, "keys": keys}}


if __name__ == "__main__":
    FILE.write_text(text())
