"""``bench guard``: what the trusted side's part of a masked product costs, piece by piece, at a model's shape."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.api.pads import row_bytes
from tsqp.arith.expand import KEY_BYTES, AesKeyStream, expand
from tsqp.arith.field import FieldWeights
from tsqp.arith.quantise import Int8Weights
from tsqp.arith.row_threads import least_rows, row_threads
from tsqp.arith.self_test import pick_kernel
from tsqp.bench.ceilings import WEIGHTS_BYTES, ceilings, print_ceilings
from tsqp.bench.machine import machine
from tsqp.bench.opened import opened
from tsqp.bench.pads import PadsReady, with_pads
from tsqp.bench.progress import watched
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.groups import GroupKey, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.errors import ChannelError
from tsqp.trusted.guard.kernels import project, quantise_and_mask
from tsqp.trusted.guard.linears import MaskedLinears, refuse
from tsqp.trusted.guard.pool import PadPool
from tsqp.trusted.guard.sources import LocalPadSource
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.messages import Call
from tsqp.wire.slot import Slot

KEY: GroupKey = ("qkv", 0)  # its input is as wide as the model


def bench_guard(run: RunConfig, work: Workload, console: Console) -> dict[str, Any]:
    """Medians of ``work.runs``, for ``work.tokens`` rows. Raises OptionError and every error of ``LLM``."""
    work.check()
    threads = run.compute.threads or cores()
    rates = ceilings("bfloat16", threads=threads)
    print_ceilings(rates, console)
    torch.set_num_threads(threads)
    config = open_checkpoint(locate(run.model)).config
    with torch.inference_mode():
        masking = _masking(config, work, run.guard.checks)
        checks = _checks(config, work, run.guard.checks)
        products = {f"rows_{rows}": _products(config, rows, work.runs) for rows in sorted({1, work.tokens})}
    prefill_s = _masked_prefill(run, work, console)
    return {
        "benchmark": "guard",
        "model": run.model,
        "threads": threads,
        "tokens": work.tokens,
        "runs": work.runs,
        "seconds": masking["with_expansion_s"],
        **masking,
        "checks": run.guard.checks,
        "check_dots_s": checks,
        "check_dots_s_per_prefill": _per_prefill(config, checks),
        "masked_prefill_s": prefill_s,
        "check_share_of_prefill": _per_prefill(config, checks) / prefill_s,
        "field_product": products,
        "pad_row_bytes": {"prefill": row_bytes(config, answer=False), "decode": row_bytes(config, answer=True)},
        "ceilings": rates,
        "machine": machine(),
    }


def median_seconds(work: Callable[[], object], runs: int, before: Callable[[], object] | None = None) -> float:
    """The median of ``runs`` times of ``work``, after one that does not count; ``before`` each, and not counted."""
    times = []
    for _ in range(runs + 1):
        if before is not None:
            before()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Silence:
    """A line that takes requests and sends nothing: what is timed is this side alone."""

    def __init__(self, largest: int) -> None:
        self._memory = memoryview(bytearray(largest))

    def next_id(self) -> int:
        return 1

    def slot(self, size: int, reply_bytes: int) -> Slot:
        return Slot(self._memory[:size], reply_bytes)

    def ask(self, kind: Literal["linear", "lm_head"], call: Call, slot: Slot) -> Silence:
        return self

    def wait(self) -> memoryview:
        return self._memory[:0]

    def fail(self, error: ChannelError) -> None:
        raise error


def _masking(config: ModelConfig, work: Workload, vectors: int) -> dict[str, float]:
    """Quantise, mask and x'·Ws of (tokens, hidden), with pads that are expanded already and with their expansion."""
    shape = linear_groups(config)["qkv"]
    wq = digits_of(shape.out_features, shape.in_features)
    group = GuardedGroup.of(KEY, Int8Weights(wq, torch.ones(len(wq)), None), None, checks=vectors)
    pool = PadPool({KEY: group}, LocalPadSource(), wait=True)
    linears = MaskedLinears(Silence(work.tokens * shape.in_features * 4), {KEY: group}, pool)
    x = torch.randn(work.tokens, shape.in_features)
    elements = elements_of(*x.shape)
    pads, sent, expected = elements.copy(), np.empty_like(elements), np.empty((work.tokens, vectors), np.uint32)
    to = sent, np.empty(work.tokens, np.float32), expected, np.empty(work.tokens, np.uint8)
    how = np.float32(group.limit), group.projections, True

    def mask(first: int, end: int) -> None:
        quantise_and_mask(x.numpy(), *how, pads[first:end], *to, first, end)

    def mask_all() -> None:
        row_threads().run(mask, work.tokens, least=least_rows(shape.in_features))

    mask_s = median_seconds(mask_all, work.runs, lambda: np.copyto(pads, elements))
    refuse(to[-1])
    return {
        "mask_s": mask_s,
        "with_expansion_s": median_seconds(lambda: linears.start(KEY, x), work.runs),
    }


def _checks(config: ModelConfig, work: Workload, vectors: int) -> dict[str, float]:
    """Seconds of one call's dot products, x'·Ws and y'·s, for each group; the LM head has one row."""
    return {
        name: dots_seconds(work.tokens if name != "lm_head" else 1, group.in_features, vectors, work.runs)
        + dots_seconds(work.tokens if name != "lm_head" else 1, group.out_features, vectors, work.runs)
        for name, group in linear_groups(config).items()
    }


def dots_seconds(rows: int, width: int, vectors: int, runs: int) -> float:
    values, check_vectors = elements_of(rows, width), elements_of(vectors, width)
    out = np.empty((rows, vectors), np.uint32)
    return median_seconds(lambda: row_threads().run(project, rows, values, check_vectors, out, least=2), runs)


def _per_prefill(config: ModelConfig, checks: dict[str, float]) -> float:
    layers = sum(seconds for name, seconds in checks.items() if name != "lm_head")
    return config.num_layers * layers + checks["lm_head"]


def _products(config: ModelConfig, rows: int, runs: int) -> dict[str, float]:
    """x'·Wqᵀ mod p of the widest group beside the same product in bfloat16, which both read their weights anew."""
    shape = linear_groups(config)["gate_up"]
    size = shape.out_features * shape.in_features
    copies = max(1, WEIGHTS_BYTES // size) if rows == 1 else 1
    kernel = pick_kernel(torch.device("cpu"))
    exact = [FieldWeights.of(digits_of(shape.out_features, shape.in_features), kernel) for _ in range(copies)]
    floats = [weights.wq.bfloat16() for weights in exact]
    masked = torch.from_numpy(elements_of(rows, shape.in_features).view(np.int32))
    x, out = masked.bfloat16(), torch.empty(rows, shape.out_features, dtype=torch.int32)

    def field_product() -> None:
        for weights in exact:
            weights.product(masked, 4, out=out)

    def float_product() -> None:
        for weight in floats:
            F.linear(x, weight)

    field_s = median_seconds(field_product, runs) / copies
    bfloat16_s = median_seconds(float_product, runs) / copies
    return {"field_s": field_s, "bfloat16_s": bfloat16_s, "ratio": field_s / bfloat16_s}


def _masked_prefill(run: RunConfig, work: Workload, console: Console) -> float:
    """Seconds of a masked prefill with its pads ready."""
    with opened(with_pads(run, work.tokens), console) as llm:
        ready, prompt = PadsReady(llm), work.prompt()
        times = [ready.run(prompt, 0)[0] for _ in watched(range(work.runs + 1), console, f"{run.model}, masked")]
    return statistics.median(times[1:])


def digits_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8)


def elements_of(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Uniform in F_p."""
    out = np.empty((rows, columns), np.uint32)
    expand(AesKeyStream(os.urandom(KEY_BYTES)), out)
    return out
