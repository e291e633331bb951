"""Products in tiles of AMX are exact for all shapes, stay within their memory and leave the registers to others."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.arith.kernels import NO_AMX
from tsqp.arith import amx, field
from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.many_rows import ManyRowsKernel
from tsqp.arith.modulus import P
from tsqp.arith.product import OffsetKernel

pytestmark = NO_AMX

ROWS = st.one_of(st.sampled_from([15, 16, 17, 31, 32, 33]), st.integers(9, 80))
INNER = st.one_of(st.sampled_from([1, 3, 4, 63, 64, 65, 128]), st.integers(1, 300))
COLUMNS = st.one_of(st.sampled_from([1, 31, 32, 33, 64]), st.integers(1, 200))
SEED = st.integers(0, 2**32 - 1)


def drawn(seed: int, digits: int, rows: int, inner: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits + 128 and weights: a third of each the greatest, a third the least."""
    generator = np.random.default_rng(seed)
    x = generator.choice([0, 255, 256], (digits, rows, inner))
    w = generator.choice([-127, 127, 256], (columns, inner))
    x = np.where(x == 256, generator.integers(0, 256, x.shape), x)
    w = np.where(w == 256, generator.integers(-127, 128, w.shape), w)
    return x.astype(np.uint8), w.astype(np.int8)


def exact_mod_p(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """By int64: sums of so few terms fit."""
    numbers = sum((x[m].astype(np.int64) - 128) << 8 * m for m in range(len(x)))
    return (numbers @ w.T.astype(np.int64)) % P


@given(seed=SEED, digits=st.sampled_from([2, 4]), rows=ROWS, inner=INNER, columns=COLUMNS)
def test_products_mod_p_are_those_of_integers(seed: int, digits: int, rows: int, inner: int, columns: int) -> None:
    x, w = drawn(seed, digits, rows, inner, columns)
    kernel, wq = ManyRowsKernel(), torch.from_numpy(w)
    out = torch.full((rows, columns), 0x55AA55AA, dtype=torch.int32)
    kernel.product_mod_p(torch.from_numpy(x), wq, kernel.offsets(wq), out)
    assert np.array_equal(out.numpy(), exact_mod_p(x, w))


@given(seed=SEED, rows=ROWS, inner=INNER, columns=COLUMNS)
def test_sums_are_those_of_integers(seed: int, rows: int, inner: int, columns: int) -> None:
    (x,), w = drawn(seed, 1, rows, inner, columns)
    kernel, wq = ManyRowsKernel(), torch.from_numpy(w)
    got = kernel.accumulate_unsigned(torch.from_numpy(x), wq) - kernel.offsets(wq)
    assert np.array_equal(got.numpy(), (x.astype(np.int64) - 128) @ w.T.astype(np.int64))


@pytest.mark.parametrize("byte", [0, 255])
def test_the_longest_sums_of_extreme_digits(byte: int) -> None:
    inner = field.MAX_FIELD_TERMS
    w = np.stack([np.full(inner, weight, np.int8) for weight in (127, -127)])
    kernel, wq = ManyRowsKernel(), torch.from_numpy(w)
    out = torch.empty(16, 2, dtype=torch.int32)
    kernel.product_mod_p(torch.full((4, 16, inner), byte, dtype=torch.uint8), wq, kernel.offsets(wq), out)
    number = sum((byte - 128) << 8 * m for m in range(4))
    assert out.tolist() == [[number * weight * inner % P for weight in (127, -127)]] * 16


def test_the_tiles_are_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that handed its work on would pass every other test."""
    for name in ("product_mod_p", "accumulate_unsigned"):
        monkeypatch.delattr(FewRowsKernel, name)
    x, w = drawn(0, 4, 40, 130, 70)
    kernel, wq = ManyRowsKernel(), torch.from_numpy(w)
    out = torch.empty(40, 70, dtype=torch.int32)
    kernel.product_mod_p(torch.from_numpy(x), wq, OffsetKernel().offsets(wq), out)
    assert np.array_equal(out.numpy(), exact_mod_p(x, w))
    assert kernel.accumulate_unsigned(torch.from_numpy(x[0]), wq).shape == (40, 70)


def loops(x: np.ndarray, words: np.ndarray, edges: tuple[int, int], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """What both loops leave in (rows, N) of ``fill`` for some blocks of 32 columns: sums and numbers mod p."""
    sums = np.full((x.shape[1], len(words)), fill, np.int32)
    mod_p = np.full((x.shape[1], len(words)), fill, np.uint32)
    amx.sums_of_many(x[0], words, 32, sums, *edges)
    amx.product_of_many(x, words, np.zeros(len(words), np.int32), 32, mod_p, *edges)
    return sums, mod_p


@pytest.mark.parametrize("edges", [(0, 1), (1, 2), (1, 3), (2, 3), (2, 2)])
def test_a_thread_writes_its_own_columns_only(edges: tuple[int, int]) -> None:
    x, w = drawn(1, 4, 33, 128, 90)
    for whole, part in zip(loops(x, w.view(np.int32), (0, 3), 0), loops(x, w.view(np.int32), edges, 77), strict=True):
        own = slice(32 * edges[0], 32 * edges[1])
        assert np.array_equal(part[:, own], whole[:, own])
        part[:, own] = 77
        assert (part == 77).all()


def test_other_threads_run_meanwhile() -> None:
    for loop in (amx.sums_of_many, amx.product_of_many):
        assert vars(loop)["targetoptions"]["nogil"]


AT_THE_EDGE = """
import tests.cached_loops
import ctypes, mmap
import numpy as np
from tsqp.arith import amx
assert amx.permitted()
PAGE = mmap.PAGESIZE
memory = np.frombuffer(mmap.mmap(-1, 16 * PAGE), np.uint8)
libc = ctypes.CDLL(None, use_errno=True)
for guard in (0, 7, 15):  # whoever reads or writes here dies
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + guard * PAGE), PAGE, 0) == 0
for rows in (16, 17, 47):
    for columns in (1, 33):
        size = 4 * rows * 128
        at_end, at_start = memory[7 * PAGE - size : 7 * PAGE], memory[PAGE : PAGE + size]
        words = memory[15 * PAGE - columns * 128 : 15 * PAGE].view(np.int32).reshape(columns, 32)
        for x in (at_end, at_start):
            out = np.empty((rows, columns), np.uint32)
            amx.product_of_many(x.reshape(4, rows, 128), words, np.zeros(columns, np.int32), 64, out, 0, 1)
            assert not out.any()
            amx.sums_of_many(x[: rows * 128].reshape(rows, 128), words, 64, out.view(np.int32), 0, 1)
            assert not out.any()
print("alive")
"""


def test_nothing_is_read_beyond_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("alive\n", 0), done.stderr


def test_tiles_are_shared_with_torch() -> None:
    """torch's products use the same registers: by turns in one thread and at once in two, all stay right."""
    x, w = drawn(2, 4, 64, 256, 96)
    kernel, wq, digits = ManyRowsKernel(), torch.from_numpy(w), torch.from_numpy(x)
    offsets, expected = kernel.offsets(wq), exact_mod_p(x, w)
    ones = torch.ones(64, 256, dtype=torch.bfloat16)

    def by_turns(_: int) -> bool:
        out = torch.empty(64, 96, dtype=torch.int32)
        right = True
        for _ in range(50):
            kernel.product_mod_p(digits, wq, offsets, out)
            right &= np.array_equal(out.numpy(), expected)
            right &= bool((ones @ ones.t() == 256).all())
            right &= torch.equal(torch._int_mm(digits[0], wq.t()).long(), digits[0].long() @ wq.long().t())
        return right

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(by_turns, range(2)))


def test_without_permission_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_XFEATURE_XTILEDATA", 63)  # what no kernel grants
    assert amx.permitted.__wrapped__() is False
