"""The GPU of a measurement: what it is, what drives it, and how long work takes on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from tsqp.bench.machine import version_of
from tsqp.cores import cores
from tsqp.model.accelerator import TorchCuda

RUNS = 20
WARM_UP = 3

Work = Callable[[], object]


def described(device: torch.device) -> dict[str, object]:
    """Device, driver and versions."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": TorchCuda().driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cores": cores(),
    }


def stream_ms(work: Work) -> float:
    """Median time of one call between two events, in milliseconds; what starting it costs, where that is more."""
    times = []
    for run in range(RUNS + WARM_UP):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if run >= WARM_UP:
            times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def graph_ms(works: Sequence[Work]) -> float:
    """Median time of one of ``works``, in milliseconds, replayed from a CUDA graph of all: nothing of starting them.

    Works that together read more than a cache holds are what a model's layers are like.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for work in works:  # compiles and reserves what a capture must not
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return stream_ms(graph.replay) / len(works)
