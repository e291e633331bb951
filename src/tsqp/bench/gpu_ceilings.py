"""What a GPU and its bus allow: no figure of a worker on it can be better. Takes some seconds.

Rates of a copy on the device (bytes read and written), of large bfloat16 and int8 products, of copies over the bus from
and to pinned and pageable memory, and what starting a kernel costs. Numbers are random: zeros multiply faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsqp.bench.gpu import Work, graph_ms, stream_ms


@dataclass(frozen=True)
class Sizes:
    """Several times what a cache holds, and products long enough to hide their start."""

    copied_bytes: int = 4 << 30
    bus_bytes: int = 64 << 20
    gemm: int = 8192
    starts: int = 200


def ceilings(
    device: torch.device,
    sizes: Sizes = Sizes(),
    timed_ms: Callable[[Work], float] = stream_ms,
    replayed_ms: Callable[[list[Work]], float] = graph_ms,
) -> dict[str, float]:
    """Rates a second; ``start_us`` of a kernel from Python and ``replayed_start_us`` from a CUDA graph."""
    source = torch.randint(-128, 128, (sizes.copied_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * sizes.copied_bytes / _seconds(timed_ms, lambda: target.copy_(source))}
    source = target = torch.empty(0)  # gives them back
    n = sizes.gemm
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    found["bf16_flop_per_s"] = 2 * n**3 / _seconds(timed_ms, lambda: a @ b.t())
    x, w = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    found["int8_op_per_s"] = 2 * n**3 / _seconds(timed_ms, lambda: torch._int_mm(x, w.t()))
    there = torch.empty(sizes.bus_bytes, dtype=torch.uint8, device=device)
    pageable = torch.randint(0, 256, (sizes.bus_bytes,), dtype=torch.uint8)
    hosts = {"pageable": pageable}
    if device.type == "cuda":
        hosts["pinned"] = pageable.pin_memory()
    for name, host in hosts.items():
        to_s = _seconds(timed_ms, lambda host=host: there.copy_(host, non_blocking=True))  # type: ignore[misc]
        from_s = _seconds(timed_ms, lambda host=host: host.copy_(there, non_blocking=True))  # type: ignore[misc]
        found[f"{name}_to_device_bytes_per_s"] = sizes.bus_bytes / to_s
        found[f"{name}_from_device_bytes_per_s"] = sizes.bus_bytes / from_s
    one = torch.zeros(1, device=device)
    found["start_us"] = 1e3 * timed_ms(lambda: [one.add_(1) for _ in range(sizes.starts)]) / sizes.starts
    found["replayed_start_us"] = 1e3 * replayed_ms([lambda: one.add_(1)] * sizes.starts)
    return found


def _seconds(timed_ms: Callable[[Work], float], work: Work) -> float:
    return timed_ms(work) / 1e3
