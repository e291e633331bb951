"""Each compiled kernel against its plain reference, bit by bit but for roundings that fall on an edge."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import tiny_model
from tsqp.checkpoint import open_checkpoint
from tsqp.model.batch import SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.kernels import CompiledKernels, Heads, Kernels, TorchKernels, pick_kernels

COMPILED: Kernels = CompiledKernels()
PLAIN: Kernels = TorchKernels()
ROWS = st.sampled_from([1, 2, 3, 127, 128, 129, 300])
SIZES = st.sampled_from([2, 16, 66, 128])
SCALES = st.sampled_from([1e-3, 1.0, 30.0])
few = settings(max_examples=40, deadline=None)


DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_same(ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Equal, but for a few elements that are the neighbouring bfloat16: roundings that fell on an edge.

    In float32 sums are added in another order, and the exponential is another polynomial.
    """
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6 * float(plain.abs().max()))
        return
    assert (ours != plain).sum() <= 2 + 1e-3 * ours.numel()
    torch.testing.assert_close(ours.float(), plain.float(), rtol=2**-6, atol=1e-30)


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, seed=st.integers(0, 99), dtype=DTYPES)
def test_rms_norm(rows: int, size: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, size, seed=seed, scale=scale, dtype=dtype), random(size, seed=seed + 1, dtype=dtype)
    ours, plain = torch.empty_like(x), torch.empty_like(x)
    COMPILED.rms_norm(x, weight, 1e-5, ours)
    PLAIN.rms_norm(x, weight, 1e-5, plain)
    assert_same(ours, plain)


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, seed=st.integers(0, 99), dtype=DTYPES)
def test_add_rms_norm(rows: int, size: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    hidden, y = (random(rows, size, seed=seed + i, scale=scale, dtype=dtype) for i in (0, 2))
    weight = random(size, seed=seed + 1, dtype=dtype)
    hiddens, outs = (hidden.clone(), hidden.clone()), (torch.empty_like(y), torch.empty_like(y))
    for kernels, changed, out in zip((COMPILED, PLAIN), hiddens, outs, strict=True):
        kernels.add_rms_norm(changed, y, weight, 1e-5, out)
    torch.testing.assert_close(*hiddens, rtol=0, atol=0)
    assert_same(*outs)


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, mean=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 99), dtype=DTYPES)
def test_layer_norm(rows: int, size: int, scale: float, mean: float, seed: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, size, seed=seed, scale=scale, dtype=dtype), random(size, seed=seed + 1, dtype=dtype)
    x += mean * scale
    ours, plain = torch.empty_like(x), torch.empty_like(x)
    COMPILED.layer_norm(x, weight, 1e-5, ours)
    PLAIN.layer_norm(x, weight, 1e-5, plain)
    if dtype == torch.float32 and size > 2:  # of two numbers nearly alike, what is left without the mean is rounding
        expected = torch.nn.functional.layer_norm(x.double(), (size,), weight.double(), None, 1e-5)
        torch.testing.assert_close(plain.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    elif size > 2:
        assert_same(ours, plain)


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, seed=st.integers(0, 99), dtype=DTYPES)
def test_silu_mul(rows: int, size: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * size, seed=seed, scale=scale, dtype=dtype)
    ours, plain = (torch.empty(rows, size, dtype=dtype) for _ in range(2))
    COMPILED.silu_mul(gate_up, ours)
    PLAIN.silu_mul(gate_up, plain)
    assert_same(ours, plain)


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, seed=st.integers(0, 99), dtype=DTYPES)
def test_gelu_mul(rows: int, size: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * size, seed=seed, scale=scale, dtype=dtype)
    ours, plain = (torch.empty(rows, size, dtype=dtype) for _ in range(2))
    COMPILED.gelu_mul(gate_up, ours)
    PLAIN.gelu_mul(gate_up, plain)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(ours.float(), plain.float(), rtol=2**-6, atol=1e-6 * scale)
    else:  # 1 + tanh loses digits where it is near 0, the sigmoid does not
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6 * scale)


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, seed=st.integers(0, 99), dtype=DTYPES)
def test_relu_squared(rows: int, size: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    up = random(rows, size, seed=seed, scale=scale, dtype=dtype)
    ours, plain = torch.empty_like(up), torch.empty_like(up)
    COMPILED.relu_squared(up, ours)
    PLAIN.relu_squared(up, plain)
    assert torch.equal(ours, plain)
    assert torch.equal(ours == 0, (up.float() <= 0) | (plain == 0))


def test_relu_squared_of_what_is_no_number_is_none() -> None:
    out = torch.empty(1, 2)
    COMPILED.relu_squared(torch.tensor([[float("nan"), float("inf")]]), out)
    assert not out.isfinite().any()


@few
@given(rows=ROWS, size=SIZES, scale=SCALES, seed=st.integers(0, 99), dtype=DTYPES)
def test_widen(rows: int, size: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    x = random(rows, size, seed=seed, scale=scale, dtype=dtype)
    for kernels in (COMPILED, PLAIN):
        out = torch.empty(rows, size)
        kernels.widen(x, out)
        assert torch.equal(out, x.float())


def test_silu_of_extreme_gates_is_finite() -> None:
    gates = torch.tensor([[-3e38, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38]]).bfloat16()
    gate_up = torch.cat((gates, torch.ones_like(gates)), dim=-1)
    ours, plain = torch.empty_like(gates), torch.empty_like(gates)
    COMPILED.silu_mul(gate_up, ours)
    PLAIN.silu_mul(gate_up, plain)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.float(), plain.float(), rtol=2**-6, atol=1e-30)


@few
@given(
    rows=st.lists(st.sampled_from([1, 1, 2, 3, 150]), min_size=1, max_size=4),
    half=st.sampled_from([1, 8, 32]),
    seed=st.integers(0, 99),
    gap=st.integers(0, 3),
    dtypes=st.sampled_from([(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]),
)
def test_store(rows: list[int], half: int, seed: int, gap: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Queries, and some rows of keys and values of each of several sequences.

    Each row goes to its own cache and position, and nowhere else.
    """
    config, (dtype, kept) = replace(open_checkpoint("synthetic:tiny").config, head_dim=2 * half), dtypes
    size, width, total = config.head_dim, config.kv_size, sum(rows)
    x, v = (random(total, gap + width + 2, seed=seed + i, dtype=dtype) for i in (0, 1))
    y = random(total, gap + config.q_size + 1, seed=seed + 4, dtype=dtype)
    cos, sin = (random(total, size, seed=seed + i, dtype=dtype) for i in (2, 3))
    found = []
    for kernels in (COMPILED, PLAIN):
        caches = [KVCache(config, kept) for _ in rows]
        for held in (held for cache in caches for held in cache.reserve(1, 12 + total)):
            held.zero_()
        spans = [SequenceRows(cache, 5 + i, sum(rows[:i]), rows[i], last=True) for i, cache in enumerate(caches)]
        q = torch.empty(config.num_heads, total, size, dtype=kept)
        kernels.store(1, Heads(y, gap), Heads(x, gap), Heads(v, gap + 1), cos, sin, q, spans)
        found.append([q.float(), *(torch.stack(cache.view(1, 0, 12 + total)).float() for cache in caches)])
    for ours, plain in zip(*found, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(ours, plain)
        else:  # multiplied and added in one step here and there
            torch.testing.assert_close(ours, plain, rtol=2**-7 if kept == torch.bfloat16 else 2e-6, atol=1e-6)
        assert torch.equal(ours == 0, plain == 0), "other positions stay as they were"


@few
@given(
    rows=st.lists(st.sampled_from([1, 1, 2, 3, 150]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    gap=st.integers(0, 3),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_store_in_8_bits(rows: list[int], seed: int, gap: int, scale: float) -> None:
    """The same integers and scales, bit for bit; zeros have scale 1."""
    config, dtype = open_checkpoint("synthetic:tiny").config, torch.float32
    size, width, total = config.head_dim, config.kv_size, sum(rows)
    x, v = (random(total, gap + width + 2, seed=seed + i, scale=scale, dtype=dtype) for i in (0, 1))
    x[0], v[-1] = 0, 0
    y = random(total, gap + config.q_size + 1, seed=seed + 4, scale=scale, dtype=dtype)
    cos, sin = (random(total, size, seed=seed + i, dtype=dtype) for i in (2, 3))
    found, queries = [], []
    for kernels in (COMPILED, PLAIN):
        caches = [KVCache(config, torch.int8) for _ in rows]
        spans = [SequenceRows(cache, 5 + i, sum(rows[:i]), rows[i], last=True) for i, cache in enumerate(caches)]
        for cache in caches:
            for held in (*cache.reserve(1, 12 + total), *cache.scales(1)):
                held.fill_(7)
        q = torch.empty(config.num_heads, total, size)
        kernels.store(1, Heads(y, gap), Heads(x, gap), Heads(v, gap + 1), cos, sin, q, spans)
        queries.append(q)
        found.append([(torch.stack(cache.view(1, 0, 12 + total)), torch.stack(cache.scales(1))) for cache in caches])
    torch.testing.assert_close(*queries, rtol=2e-6, atol=1e-6 * scale)
    for (integers, scales), (plain, plain_scales) in zip(*found, strict=True):
        assert torch.equal(scales, plain_scales)
        assert torch.equal(integers, plain)
    first, last = found[0][0], found[0][-1]
    assert (first[0][0, :, 5] == 0).all()
    assert (first[1][0, :, 5] == 1).all()
    assert (last[1][1, :, len(rows) + 3 + rows[-1]] == 1).all()
    assert (first[0][:, :, :5] == 7).all(), "other positions stay as they were"
    assert (first[1][:, :, 5 + rows[0] : 12 + total] == 7).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not_either(bad: float) -> None:
    """Attention makes of it what is not finite, and the guard refuses that."""
    config = open_checkpoint("synthetic:tiny").config
    x, y = (random(3, width, seed=1, dtype=torch.float32) for width in (config.kv_size, config.q_size))
    x[1, 3] = bad
    q = torch.empty(config.num_heads, 3, config.head_dim)
    cache, ones = KVCache(config, torch.int8), torch.ones(3, config.head_dim)
    spans = [SequenceRows(cache, 0, 0, 3, last=True)]
    COMPILED.store(0, Heads(y, 0), Heads(x, 0), Heads(x, 0), ones, ones, q, spans)
    for scales in cache.scales(0):
        assert not scales[0, 1].isfinite()
        assert scales[:, [0, 2]].isfinite().all()
        assert scales[1:, :3].isfinite().all()


@few
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_store_of_decode_steps_and_prompts_together(counts: list[int], seed: int) -> None:
    """Sequences with one row and with several, and one sequence in two parts, the second of which grows its cache."""
    config = open_checkpoint("synthetic:tiny").config
    total = sum(counts) + 2
    x, v = (random(total, config.kv_size, seed=seed + i, dtype=torch.float32) for i in (0, 1))
    cos, sin = (random(total, config.head_dim, seed=seed + i, dtype=torch.float32) for i in (2, 3))
    y = random(total, config.q_size, seed=seed + 4, dtype=torch.float32)
    found = []
    for kernels in (COMPILED, PLAIN):
        caches = [KVCache(config, torch.float32) for _ in counts]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        spans = [SequenceRows(*it, last=True) for it in zip(caches, counts, firsts, counts, strict=True)]
        spans += [SequenceRows(caches[0], 2 * counts[0] + i, total - 2 + i, 1, last=True, step=True) for i in (0, 1)]
        for cache in caches:
            cache.reserve(1, 1)[0].zero_()
        q = torch.empty(config.num_heads, total, config.head_dim)
        kernels.store(1, Heads(y, 0), Heads(x, 0), Heads(v, 0), cos, sin, q, spans)
        held = [torch.stack(cache.view(1, n, 2 * n)) for cache, n in zip(caches, counts, strict=True)]
        found.append([q, *held, torch.stack(caches[0].view(1, 2 * counts[0], 2 * counts[0] + 2))])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6)


def test_the_choice_of_kernels() -> None:
    assert isinstance(pick_kernels(torch.bfloat16), CompiledKernels)
    assert isinstance(pick_kernels(torch.bfloat16, compiled=False), TorchKernels)
    assert isinstance(pick_kernels(torch.float32), CompiledKernels)
    for other in (pick_kernels(torch.float16), pick_kernels(torch.bfloat16, "meta")):
        assert isinstance(other, TorchKernels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_forward_pass_waits_for_a_compiler(dtype: str) -> None:
    """In a process of its own: in this one every loop has been compiled."""
    code = f"""
import tests.cached_loops
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.model import compiled
loops = (compiled.rms_norm, compiled.add_rms_norm, compiled.silu_mul, compiled.widen, compiled.store)
compute = ComputeConfig(dtype={dtype!r}, kernel_cache="off")
with LLM({str(tiny_model("llama").directory)!r}, protection="local", compute=compute) as llm:
    before = [loop.signatures for loop in loops]
    llm.generate(list(range(1, 9)), SamplingParams(max_tokens=3))
    print([len(signatures) for signatures in before], [loop.signatures for loop in loops] == before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split("\n")[0] == "[1, 1, 1, 1, 1] True", run.stderr


def test_nothing_is_cached_unless_this_package_named_a_directory(tmp_path: Path) -> None:
    """A variable of numba's own, which whoever starts the process may set, is not enough: the cache is code."""
    enable = f"from pathlib import Path; from tsqp.arith.jit import enable_cache; enable_cache(Path({str(tmp_path)!r}))"
    show = "import tsqp.model.compiled as c; print(c.rms_norm._cache.__class__.__name__)"
    for code, expected in ((show, "NullCache"), (f"{enable}; {show}", "FunctionCache")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == expected
