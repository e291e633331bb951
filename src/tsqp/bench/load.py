"""``bench load``: a real server under load. What HTTP adds to the library's decode, and how long clients wait: when as
many ask as in a sweep, and when requests come by chance.

``open`` in bfloat16 and ``masked`` are ``tsqp serve`` processes; llama.cpp's server is asked by the same client; the
same batch in transformers, which has no server, stands beside them. The client shares the cores with what it measures.
A masked server has its pads ready before anything is measured, and says afterwards how fast it made them.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.api.llm import LLM
from tsqp.bench.arrivals import Prompt, prompts
from tsqp.bench.device import check_device
from tsqp.bench.load_setup import Load
from tsqp.bench.machine import machine
from tsqp.bench.modes import chosen_modes, in_mode
from tsqp.bench.opened import opened
from tsqp.bench.pads import ready_for
from tsqp.bench.progress import steps
from tsqp.cores import cores
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tsqp.bench.load_targets import OurServer

Point = dict[str, Any]  # figures of one number of streams, or of one rate of arrivals


def check_client() -> None:
    """Raises OptionError where there is no client to measure with."""
    if importlib.util.find_spec("httpx") is None:
        raise OptionError("measuring a server over HTTP needs httpx: pip install 'tsqp[bench]'")


def bench_load(run: RunConfig, load: Load, console: Console, only: str | None = None) -> dict[str, Any]:
    """Everything, or ``only`` one of the two modes without peers. Raises OptionError and every error of ``LLM``."""
    load.check()
    check_client()
    check_device(run.worker.device)
    from tsqp.bench.load_targets import OurServer, Target, peers  # with them comes httpx

    modes = chosen_modes(only)
    sweep, arrivals = defaultdict[str, list[Point]](list), defaultdict[str, list[Point]](list)
    with ExitStack() as stack:
        ours = {mode: stack.enter_context(OurServer(run, mode, load)) for mode in modes}
        with steps(console, len(ours)) as bar:
            for server in ours.values():
                server.settle(bar)
                bar.done()
        alone = {mode: _beside_library(run, server, load, console) for mode, server in ours.items()}
        targets: list[Target] = [*ours.values(), *(peers(run, load, stack, console) if only is None else ())]
        points = len(load.streams) * len(targets) + len(load.shares) * len(ours)
        with steps(console, points) as bar:
            for streams in load.streams:
                for target in targets:
                    sweep[target.name].append({"streams": streams, **target.at_once(streams, bar)})
                    bar.done()
            best = {mode: max(point["tokens_per_s"] for point in sweep[mode]) / load.count for mode in ours}
            for share in load.shares:
                for mode, server in ours.items():
                    arrivals[mode].append({"share": share, **server.by_chance(share * best[mode], bar)})
                    bar.done()
        pads = {mode: server.pads() for mode, server in ours.items()}
    return {
        "benchmark": "load",
        "model": run.model,
        "device": run.worker.device,
        "threads": run.compute.threads or cores(),
        **asdict(load),
        "http": alone,
        "sweep": dict(sweep),
        "arrivals": dict(arrivals),
        "made_pads": {mode: made for mode, made in pads.items() if made is not None},
        "machine": machine(),
    }


def _beside_library(run: RunConfig, server: OurServer, load: Load, console: Console) -> dict[str, Any]:
    """Seconds of a token after the first one, of one answer at a time: from the library, and over HTTP, in turns."""
    count, asked = load.alone, prompts(load.tokens, load.seed + 1)
    library, http = list[float](), list[float]()
    with opened(in_mode(run, server.name), console) as llm, steps(console, load.runs + 1) as bar:
        for _ in range(load.runs + 1):
            ready_for(llm, load.tokens + count + 1, count + 1)
            bar.begin(f"{server.name}: library and server")
            library.append(_token_s(llm, next(asked), count))
            http.append(server.one(count).token_s)
            server.settle(bar)
            bar.done()
    del library[0], http[0]  # the first answers take longer
    medians = {"library_s": statistics.median(library), "http_s": statistics.median(http)}
    ratio = medians["http_s"] / medians["library_s"]
    return {**medians, "ratio": ratio, "all": {"library": library, "http": http}}


def _token_s(llm: LLM, prompt: Prompt, count: int) -> float:
    """Seconds of a token after the first one, as the library streams them."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    arrived = [time.perf_counter() for _ in llm.stream(prompt, params)]
    return (arrived[-1] - arrived[0]) / (count - 1)
