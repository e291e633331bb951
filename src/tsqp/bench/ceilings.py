"""What the machine itself allows, measured in the same run: no figure can be better than these."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from tsqp.bench.reading import reading
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.wire.payload import TORCH_DTYPES

OUT, IN, ROWS = 8192, 2048, 1024  # the gate matrix of the 1B shape, and a prompt's rows
WEIGHTS_BYTES = 256 * 2**20  # read once per decode step: beyond the last-level cache of most machines
COPY_BYTES = 64 * 2**20
LEAST_TRIES, MOST_TRIES, TRY_FOR_S = 5, 50, 0.5


def ceilings(dtype_name: str, device_name: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """The rates of this machine with ``threads`` CPU threads, all cores when None. Takes a second or two.

    ``gemm_flop_per_s``: 2·m·n·k over the time of x (1,024 × 2,048) · Wᵀ (2,048 × 8,192). ``weight_read_bytes_per_s``:
    one row times 256 MB of such matrices, over their bytes; on a CPU a plain read of them where that is faster, since
    products of one row are not all as fast as memory. ``copy_bytes_per_s``: a copy of 64 MiB. The best try
    counts, not the median: these are bounds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or cores())
    try:
        device = torch.device(device_name)
        gemm_s, read_s, read_bytes = _gemm(dtype_name, device)
        source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.ones(COPY_BYTES, dtype=torch.uint8)
        return {
            "dtype": dtype_name,
            "device": device_name,
            "threads": threads or cores(),
            "gemm_flop_per_s": 2 * ROWS * OUT * IN / gemm_s,
            "weight_read_bytes_per_s": read_bytes / read_s,
            "copy_bytes_per_s": COPY_BYTES / fastest_seconds(lambda: target.copy_(source)),
        }
    finally:
        torch.set_num_threads(before)


def higher(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The better of two measurements, rate by rate: what else runs on a machine may slow one of them."""
    return {key: max(value, after[key]) if key.endswith("_per_s") else value for key, value in before.items()}


def _gemm(dtype_name: str, device: torch.device) -> tuple[float, float, int]:
    """Seconds of the large product, seconds and bytes of one row against many matrices."""
    int8 = dtype_name == "int8"
    base = torch.randn(OUT, IN)
    weight = ((base * 40).to(torch.int8) if int8 else base.to(TORCH_DTYPES[dtype_name])).to(device)  # type: ignore[index]
    count = max(1, WEIGHTS_BYTES // (weight.numel() * weight.element_size()))
    weights = [weight, *(weight.clone() for _ in range(count - 1))]
    many = torch.ones(ROWS, IN, dtype=weight.dtype, device=device)

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x, w.t()) if int8 else F.linear(x, w)

    def decode_step() -> None:
        rows = many[:32] if int8 and device.type == "cuda" else many[:1]  # cuBLAS takes no fewer rows in int8
        for one in weights:
            product(rows, one)
        synchronize(device)

    def prefill_step() -> None:
        product(many, weight)
        synchronize(device)

    with torch.inference_mode():
        reads = [decode_step] if device.type == "cuda" else [decode_step, reading(weights)]
        return (
            fastest_seconds(prefill_step),
            min(map(fastest_seconds, reads)),
            count * weight.numel() * weight.element_size(),
        )


def limits(config: ModelConfig, tokens: int, rates: dict[str, Any]) -> dict[str, float]:
    """Seconds that the linear layers alone need at these rates: prefill of ``tokens``, decode of one token."""
    groups = linear_groups(config)
    head = groups.pop("lm_head")
    layers = config.num_layers * sum(group.in_features * group.out_features for group in groups.values())
    once = head.in_features * head.out_features
    item_bytes = 1 if rates["dtype"] == "int8" else TORCH_DTYPES[rates["dtype"]].itemsize
    return {
        "prefill": 2 * (tokens * layers + once) / rates["gemm_flop_per_s"],
        "decode": (layers + once) * item_bytes / rates["weight_read_bytes_per_s"],
    }


def model_limits(model: str, tokens: int, rates: dict[str, Any]) -> dict[str, float]:
    """The same for a checkpoint."""
    return limits(open_checkpoint(model).config, tokens, rates)


def fastest_seconds(work: Callable[[], object]) -> float:
    """The shortest time of ``work`` in some tries: what the machine can do when nothing else asks for it."""
    work()
    times: list[float] = []
    while len(times) < LEAST_TRIES or (sum(times) < TRY_FOR_S and len(times) < MOST_TRIES):
        times.append(seconds_of(work))
    return min(times)


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes, this time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_ceilings(rates: dict[str, Any], console: Console) -> None:
    """The one line that comes before every result."""
    console.print(
        f"limits of this machine, {rates['device']}, {rates['threads']} threads: {rates['dtype']} products at "
        f"{rates['gemm_flop_per_s'] / 1e12:.2f} TFLOP/s, weights read at "
        f"{rates['weight_read_bytes_per_s'] / 1e9:.1f} GB/s, memory copied at "
        f"{rates['copy_bytes_per_s'] / 1e9:.1f} GB/s",
        highlight=False,
        soft_wrap=True,
    )
