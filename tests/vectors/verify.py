"""Recomputes guard.json from docs/masking.md in plain Python, without this package: ``python verify.py [FILE]``."""

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

Matrix = list[list[int]]
P, HALF = 2**31 - 1, 2**30 - 1


def floats(texts: list[str]) -> list[float]:
    return [struct.unpack(">f", bytes.fromhex(text))[0] for text in texts]


def texts(values: list[float]) -> list[str]:
    return [struct.pack(">f", value).hex() for value in values]


def f32(value: float) -> float:  # rounds once: a double is exact enough for one operation on float32
    return floats(texts([value]))[0]


def matmul(x: Matrix, w: Matrix) -> Matrix:
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in w] for row in x]


def mod(x: Matrix, low: int = 0) -> Matrix:  # to low … low + p - 1
    return [[(value - low) % P + low for value in row] for row in x]


def quantise(x: list[list[str]], levels: int) -> dict[str, Any]:  # §1
    digits, scales = [], []
    for row in map(floats, x):
        scale = f32(max(map(abs, row)) / levels)
        scales.append(scale if scale >= 2.0**-126 else 1.0)
        digits.append([max(-levels, min(levels, round(f32(value / scales[-1])))) for value in row])
    return {"digits": digits, "scales": texts(scales)}


def limit(norm: int) -> dict[str, Any]:  # §1: norm is the largest ‖Wq[j,:]‖₁
    q_max = min(127 * 256 + 127, HALF // max(1, norm))
    return {"q_max": q_max, "refused": q_max < 127}


def product(x: Matrix, wq: Matrix, digits: int) -> dict[str, Any]:  # §2
    rest, split = mod(x, -HALF), []
    for _ in range(digits):
        split.append([[(value + 128) % 256 - 128 for value in row] for row in rest])
        rest = [[(value + 128) // 256 for value in row] for row in rest]
    return {"split": split, "sums": [matmul(digit, wq) for digit in split], "y": mod(matmul(x, wq))}


def masked(xq: Matrix, r: Matrix, wq: Matrix, s_x: list[str], s_w: list[str], b: list[str]) -> dict[str, Any]:  # §3
    x = mod([[value + pad for value, pad in zip(*rows, strict=True)] for rows in zip(xq, r, strict=True)])
    y, undo = mod(matmul(x, wq)), mod(matmul(r, wq))
    exact = mod([[value - pad for value, pad in zip(*rows, strict=True)] for rows in zip(y, undo, strict=True)], -HALF)
    scaled = [[f32(f32(value) * scale) for value in row] for row, scale in zip(exact, floats(s_x), strict=True)]
    columns = list(zip(floats(s_w), floats(b), strict=True))
    result = [[f32(f32(v * w) + c) for v, (w, c) in zip(row, columns, strict=True)] for row in scaled]
    return {"x": x, "y": y, "undo": undo, "exact": exact, "result": [texts(row) for row in result]}


def check(x: Matrix, wq: Matrix, s: Matrix, y: Matrix) -> dict[str, Any]:  # §4
    w_s = mod(matmul(s, [list(column) for column in zip(*wq, strict=True)]))
    verdict = "accept" if mod(matmul(y, s)) == mod(matmul(x, w_s)) else "ProductMismatch"
    return {"w_s": w_s, "verdict": verdict if y == mod(y) else "ReplyRangeError"}


def twice(value: int) -> int:  # in GF(2⁸)
    return value << 1 ^ (value >> 7) * 0x11B


POWERS, SBOX = [1], [0x63] * 256
for _ in range(254):  # of 3
    POWERS.append(POWERS[-1] ^ twice(POWERS[-1]))
for i, value in enumerate(POWERS):
    for turned in (POWERS[-i % 255] << shift for shift in range(5)):
        SBOX[value] ^= turned & 255 ^ turned >> 8


def aes_blocks(key: bytes) -> Iterator[bytes]:  # FIPS 197, in counter mode from 0
    words, constant = [key[i : i + 4] for i in range(0, 32, 4)], 1
    for i in range(8, 60):
        word = words[-1][1:] + words[-1][:1] if i % 8 == 0 else words[-1]
        new = [a ^ (SBOX[b] if i % 4 == 0 else b) for a, b in zip(words[-8], word, strict=True)]
        if i % 8 == 0:
            new[0], constant = new[0] ^ constant, constant * 2
        words.append(bytes(new))
    keys = [b"".join(words[i : i + 4]) for i in range(0, 60, 4)]
    for counter in count():
        state = [a ^ b for a, b in zip(counter.to_bytes(16, "big"), keys[0], strict=True)]
        for number, round_key in enumerate(keys[1:], 1):
            state = [SBOX[state[5 * i % 16]] for i in range(16)]
            columns = [state[i : i + 4] for i in range(0, 16, 4)] if number < 14 else []
            mixed = [twice(c[i] ^ c[i - 3]) ^ c[i - 3] ^ c[i - 2] ^ c[i - 1] for c in columns for i in range(4)]
            state = [a ^ b for a, b in zip(mixed or state, round_key, strict=True)]
        yield bytes(state)


def expand(n: int, key: str = "", stream: str = "") -> dict[str, Any]:  # §5
    source = iter(bytes.fromhex(stream)) if stream else chain.from_iterable(aes_blocks(bytes.fromhex(key)))
    words = iter(lambda: int.from_bytes(bytes(islice(source, 4)), "little") & P, None)
    elements = [word if word != P else next(fresh for fresh in words if fresh != P) for word in list(islice(words, n))]
    sha256 = hashlib.sha256(b"".join(element.to_bytes(4, "little") for element in elements)).hexdigest()
    return {"first": elements[:20], "sha256": sha256, "next": next(words)}


def ratchet(root: str, steps: int) -> dict[str, Any]:  # §5
    states, keys = [root], []
    for _ in range(steps):
        stream = b"".join(islice(aes_blocks(bytes.fromhex(states[-1])), 4))
        states.append(stream[:32].hex())
        keys.append(stream[32:].hex())
    return {"states": states[1:], "keys": keys}


def main(path: Path) -> int:
    vectors, failed = json.loads(path.read_text()), 0
    for section in (quantise, limit, product, masked, check, expand, ratchet):
        cases = vectors[section.__name__]
        wrong = [number for number, case in enumerate(cases) if section(**case["in"]) != case["out"]]
        failed += bool(wrong or not cases)
        print(section.__name__, f"cases {wrong} differ" if wrong else f"{len(cases)} cases agree")  # noqa: T201
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("guard.json")))
