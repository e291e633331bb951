"""Every kernel of digits gives exact products, sums and numbers mod p alike, whatever the shapes, bytes and memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.arith.kernels import CPU, KERNELS, NO_VNNI, SATURATES
from tsqp.arith import field, product, self_test, vnni
from tsqp.arith.digits_torch import join_torch
from tsqp.arith.few_rows import LEAST_WEIGHTS, FewRowsKernel, least_columns
from tsqp.arith.many_rows import ManyRowsKernel
from tsqp.arith.modulus import P
from tsqp.arith.product import DigitKernel, OffsetKernel
from tsqp.arith.self_test import is_exact, pick_kernel

BYTE = st.one_of(st.sampled_from([0, 127, 128, 255]), st.integers(0, 255))
WEIGHT = st.one_of(st.sampled_from([-127, 0, 127]), st.integers(-127, 127))
INNER = st.one_of(st.sampled_from([1, 31, 32, 33, 63, 64, 65, 127, 128, 129]), st.integers(1, 200))
COLUMNS = st.integers(1, 10)  # tiles of two or four, and what is left of them


def exact_mod_p(x: np.ndarray, w: np.ndarray) -> list[list[int]]:
    """Digits + 128, (digits, T, K), in Python's integers."""
    numbers = sum((x[m].astype(object) - 128) << 8 * m for m in range(len(x)))
    found: list[list[int]] = (numbers @ w.T.astype(object) % P).tolist()
    return found


def mod_p(kernel: DigitKernel, x: np.ndarray, w: np.ndarray) -> list[list[int]]:
    """The kernel's, in one."""
    wq, out = torch.from_numpy(w), torch.full((x.shape[1], len(w)), 0x55AA55AA, dtype=torch.int32)
    kernel.product_mod_p(torch.from_numpy(x), wq, kernel.offsets(wq), out)
    found: list[list[int]] = out.tolist()
    return found


@pytest.mark.skipif(not FewRowsKernel.supported(), reason="no vpdpbusd here")
@pytest.mark.parametrize("digits", [2, 4])
@given(rows=st.integers(1, 9), inner=INNER, columns=COLUMNS, seed=st.integers(0, 99))
def test_a_prepared_product_is_the_product_of_what_lies_there(
    digits: field.Digits, rows: int, inner: int, columns: int, seed: int
) -> None:
    kernel, generator = FewRowsKernel(), torch.Generator().manual_seed(seed)
    w = torch.randint(-127, 128, (columns, inner), dtype=torch.int8, generator=generator)
    x = torch.zeros(rows, inner, dtype=torch.int32 if digits == 4 else torch.int16)
    out, expected = torch.empty(2, rows, columns, dtype=torch.int32)
    weights = field.FieldWeights.of(w, kernel)
    run = kernel.prepared(x, digits, w, weights.offsets, out)
    assert run is not None
    for _ in range(2):
        low, high = (0, P) if digits == 4 else (-field.MAX_SMALL, field.MAX_SMALL + 1)
        x.copy_(torch.randint(low, high, x.shape, generator=generator))
        run()
        weights.product(x, digits, out=expected)
        assert torch.equal(out, expected)


def test_more_rows_than_few_are_not_prepared() -> None:
    kernel, w = FewRowsKernel(), torch.ones(4, 64, dtype=torch.int8)
    x = torch.zeros(kernel.few // 4 + 1, 64, dtype=torch.int32)
    out = torch.empty(len(x), 4, dtype=torch.int32)
    assert kernel.prepared(x, 4, w, kernel.offsets(w), out) is None


def sums(kernel: DigitKernel, x: np.ndarray, w: np.ndarray) -> list[list[list[int]]]:
    """The kernel's, of digits as they are and of digits + 128."""
    wq, bytes_of_x = torch.from_numpy(w), torch.from_numpy(x)
    both = kernel.accumulate((bytes_of_x ^ 128).view(torch.int8), wq), kernel.accumulate_unsigned(bytes_of_x, wq)
    return [(one - kernel.offsets(wq)).tolist() for one in both]


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data(), rows=st.integers(1, 9), inner=INNER, columns=COLUMNS)
def test_sums_are_those_of_integers(
    kernel: DigitKernel, data: st.DataObject, rows: int, inner: int, columns: int
) -> None:
    x = data.draw(arrays(np.uint8, (rows, inner), elements=BYTE))
    w = data.draw(arrays(np.int8, (columns, inner), elements=WEIGHT))
    expected = ((x.astype(object) - 128) @ w.T.astype(object)).tolist()
    assert sums(kernel, x, w) == [expected, expected]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("digits", [2, 4])
@given(data=st.data(), rows=st.integers(1, 5), inner=INNER, columns=COLUMNS)
def test_products_mod_p_are_those_of_integers(
    kernel: DigitKernel, digits: int, data: st.DataObject, rows: int, inner: int, columns: int
) -> None:
    x = data.draw(arrays(np.uint8, (digits, rows, inner), elements=BYTE))
    w = data.draw(arrays(np.int8, (columns, inner), elements=WEIGHT))
    assert mod_p(kernel, x, w) == exact_mod_p(x, w)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("byte", [0, 255])
def test_the_longest_sums_of_extreme_digits(kernel: DigitKernel, byte: int) -> None:
    """At both bounds sums of d + 128 have wrapped around, or are about to; less the offsets they are right."""
    w = np.stack([np.full(field.MAX_FIELD_TERMS, weight, np.int8) for weight in (127, -127)])
    assert mod_p(kernel, np.full((4, 1, len(w[0])), byte, np.uint8), w) == exact_mod_p(
        np.full((4, 1, 1), byte, np.uint8), w[:, :1].astype(object) * len(w[0])
    )
    w = w[:, : product.MAX_INT8_TERMS].copy()
    true = [(byte - 128) * weight * product.MAX_INT8_TERMS for weight in (127, -127)]
    assert sums(kernel, np.full((2, product.MAX_INT8_TERMS), byte, np.uint8), w) == [[true, true], [true, true]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 8, 16, 17])  # to either side of where the other way is faster
@pytest.mark.parametrize("inner", [576, 2048, 2050])
def test_either_way_of_a_product_is_the_same(kernel: DigitKernel, rows: int, inner: int) -> None:
    generator = np.random.default_rng(rows)
    w = torch.from_numpy(generator.integers(-127, 128, (301, inner), np.int8))
    x = torch.from_numpy(generator.integers(0, P, (rows, inner), np.int32))
    got = torch.empty(rows, 301, dtype=torch.int32)
    field.FieldWeights.of(w, kernel).product(x, 4, out=got)
    expected = (x.long() @ w.long().t()) % P  # sums of so many terms fit into int64
    assert torch.equal(got.long(), expected)
    wide = torch.empty(rows, 302, dtype=torch.int32)[:, :301]  # rows that do not follow closely
    field.FieldWeights.of(w, kernel).product(x, 4, out=wide)
    assert torch.equal(wide.long(), expected)


@NO_VNNI
@pytest.mark.parametrize("edges", [(0, 1), (1, 4), (2, 9), (9, 11), (5, 5), (0, 11)])
def test_a_thread_writes_its_own_columns_only(edges: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    x, w = generator.integers(0, 256, (8, 70), np.uint8), generator.integers(-127, 128, (11, 70), np.int8)
    offsets = OffsetKernel().offsets(torch.from_numpy(w)).numpy()
    out, mod = np.full((8, 11), 77, np.int32), np.full((2, 11), 77, np.uint32)
    vnni.sums_of_few(x, w, out, *edges)
    vnni.product_of_few(x, w, offsets, mod, *edges)
    own = slice(*edges)
    assert np.array_equal(out[:, own], (x.astype(np.int64) @ w.T.astype(np.int64))[:, own])
    assert mod[:, own].tolist() == [row[own] for row in exact_mod_p(x.reshape(4, 2, 70), w)]
    out[:, own], mod[:, own] = 77, 77
    assert (out == 77).all()
    assert (mod == 77).all()


@NO_VNNI
def test_other_threads_run_meanwhile() -> None:
    for loop in (vnni.sums_of_few, vnni.product_of_few):
        assert vars(loop)["targetoptions"]["nogil"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shift", [0, 1, 3, 63])
def test_memory_that_is_shared_and_not_aligned(kernel: DigitKernel, shift: int) -> None:
    generator = np.random.default_rng(shift)
    with mmap.mmap(-1, 1 << 16) as arena:
        memory = np.frombuffer(arena, np.uint8)
        x = memory[shift : shift + 4 * 130].reshape(4, 1, 130)
        w = memory[4096 + shift : 4096 + shift + 7 * 130].view(np.int8).reshape(7, 130)
        x[:], w[:] = generator.integers(0, 256, x.shape), generator.integers(-127, 128, w.shape)
        out = torch.from_numpy(memory[8192 + 4 * shift : 8192 + 4 * shift + 28].view(np.int32).reshape(1, 7))
        wq = torch.from_numpy(w)
        kernel.product_mod_p(torch.from_numpy(x), wq, kernel.offsets(wq), out)
        assert out.tolist() == exact_mod_p(x, w)
        before, after = 8192 + 4 * shift, 8192 + 4 * shift + 28
        assert not memory[8192:before].any()
        assert not memory[after:].any()
        del memory, x, w, wq, out  # or the map cannot be closed


AT_THE_EDGE = """
import tests.cached_loops
import ctypes, mmap
import numpy as np
from tsqp.arith import vnni
PAGE = mmap.PAGESIZE
arena = mmap.mmap(-1, 4 * PAGE)
memory = np.frombuffer(arena, np.uint8)
start = memory.ctypes.data
libc = ctypes.CDLL(None, use_errno=True)
for guard in (PAGE, 3 * PAGE):  # whoever reads here dies
    assert libc.mprotect(ctypes.c_void_p(start + guard), PAGE, 0) == 0
for inner in (1, 63, 64, 65, 130, 192):
    for rows in (1, 3, 4, 5):
        x, w = memory[PAGE - rows * inner : PAGE], memory[3 * PAGE - rows * inner : 3 * PAGE]
        x, w = x.reshape(rows, inner), w.view(np.int8).reshape(rows, inner)
        out = np.empty((rows, rows), np.int32)
        vnni.sums_of_few(x, w, out, 0, rows)
        assert not out.any()
print("alive")
"""


@NO_VNNI
def test_nothing_is_read_beyond_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("alive\n", 0), done.stderr


def saturated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Pairs of products added in 16 bits, which is what ``vpmaddubsw`` does."""
    pairs = (x.long().unsqueeze(1) * w.long().unsqueeze(0)).unflatten(2, (-1, 2)).sum(dim=3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(dim=2).to(torch.int32)


class SaturatingSums(FewRowsKernel):
    def accumulate_unsigned(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return saturated(x, w)


class SaturatingProducts(FewRowsKernel):
    def product_mod_p(self, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(join_torch(saturated(x.flatten(0, 1), w).view(len(x), x.shape[1], len(w)), offsets))


@NO_VNNI
@SATURATES
@pytest.mark.parametrize("kernel", [SaturatingSums(), SaturatingProducts()], ids=["sums", "products"])
def test_the_self_test_finds_saturation(kernel: DigitKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_exact(FewRowsKernel(), CPU)
    assert not is_exact(kernel, CPU)
    monkeypatch.setattr(self_test, "FewRowsKernel", type(kernel))
    monkeypatch.setattr(ManyRowsKernel, "supported", lambda: False)
    assert type(pick_kernel.__wrapped__(CPU)) is OffsetKernel


PICKED = """
import torch
from tsqp.arith import vnni
from tsqp.arith.self_test import is_exact, pick_kernel
kernel = pick_kernel(torch.device("cpu"))
print(vnni.VECTOR, type(kernel).__name__, is_exact(kernel, torch.device("cpu")))
if type(kernel).__name__ in ("FewRowsKernel", "ManyRowsKernel"):
    (assembly,) = vnni._sums.inspect_asm().values()
    assert "vpdpbusd" in assembly and ("zmm" in assembly) == (vnni.VECTOR == 64)
"""
SHORT = "+sse2,+sse4.2,+popcnt,+avx,+avx2,+fma,+bmi,+bmi2,+avxvnni"


def picked(**variables: str) -> list[str]:
    """Bytes of a vector, the kernel's name and whether it is exact, in a process with these variables."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", PICKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@NO_VNNI
@SATURATES
def test_few_rows_are_picked_where_they_are_exact() -> None:
    best = ManyRowsKernel if ManyRowsKernel.supported() else FewRowsKernel
    assert picked() == [str(vnni.VECTOR), best.__name__, "True"]


@SATURATES
def test_without_the_instruction_the_next_kernel_is_picked() -> None:
    assert picked(NUMBA_CPU_NAME="generic") == ["0", "OffsetKernel", "True"]


@SATURATES
def test_without_compiled_loops_the_next_kernel_is_picked() -> None:
    assert picked(NUMBA_DISABLE_JIT="1")[1:] == ["OffsetKernel", "True"]


@SATURATES
@pytest.mark.skipif("avxvnni" not in vnni.features(), reason="this processor has no AVX-VNNI")
def test_vectors_of_256_bits_are_exact_too() -> None:
    assert picked(NUMBA_CPU_NAME="alderlake", NUMBA_CPU_FEATURES=SHORT) == ["32", "FewRowsKernel", "True"]


@pytest.mark.parametrize(
    ("has", "size"),
    [
        ({"avx512vnni", "avx512bw", "avx512vl", "avxvnni"}, 64),
        ({"avx512vnni", "avx512vl"}, 32),
        ({"avx2", "avxvnni"}, 32),
        ({"avx512bw", "avx512vl", "avx2"}, 0),
        (set(), 0),
    ],
)
def test_the_size_of_vectors(has: set[str], size: int) -> None:
    assert vnni.vector_bytes(has) == size


def test_more_rows_are_worth_a_second_thread_for_fewer_weights() -> None:
    """The time of one row of numbers, four of digits, is that of reading; the time of more is that of multiplying."""
    w = torch.empty(1, 512, dtype=torch.int8)
    assert [least_columns(w, rows) * 512 for rows in (1, 4, 8, 64)] == [
        LEAST_WEIGHTS,
        LEAST_WEIGHTS,
        LEAST_WEIGHTS // 2,
        LEAST_WEIGHTS // 16,
    ]
    assert least_columns(torch.empty(1, LEAST_WEIGHTS, dtype=torch.int8), 64) == 2
