"""What it costs to be oblivious at the 1B shape: ``python -m benchmarks.oblivious [--oram]``.

A row of an embedding of 128,256 times 2,048 in bfloat16, and a token out of 128,256 logits: milliseconds, the least of
several, beside the plain way. ``--oram`` builds the tree first, which takes a minute or more and 1.1 GB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from tsqp import SamplingParams
from tsqp.model.oblivious_embedding import embedding_here
from tsqp.trusted.engine.oblivious import ObliviousSampler
from tsqp.trusted.engine.sampling import Sampler
from tsqp.trusted.stats import Stats

VOCAB, HIDDEN = 128_256, 2048
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "logprobs 5": {"logprobs": 5},
    "all": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "logprobs": 5},
}


def least_ms(work: Callable[[], object], times: int = 7) -> float:
    """The least of several, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return round(min(found) * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oram", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {"threads": arguments.threads, "embedding_ms": {}, "sampler_ms": {}}
    table = torch.randint(-30000, 30000, (VOCAB, HIDDEN), dtype=torch.int16).view(torch.bfloat16)
    for name, oblivious in (("plain", False), ("scan", True)):
        embedding = embedding_here(table, Stats(), oblivious=oblivious)
        for rows in (1, 16):
            tokens = torch.randint(0, VOCAB, (rows,))
            found["embedding_ms"][f"{name}, {rows} rows"] = least_ms(embedding.start(tokens).wait)
    if arguments.oram:
        start = time.perf_counter()
        embedding = embedding_here(table, Stats(), oblivious=True, way="oram")
        found["oram_build_s"] = round(time.perf_counter() - start, 1)
        found["embedding_ms"]["oram, 1 row"] = least_ms(embedding.start(torch.randint(0, VOCAB, (1,))).wait, 50)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    for name, params in SAMPLINGS.items():
        for kind in (Sampler, ObliviousSampler):
            sampler = kind(SamplingParams(seed=1, **params), prompt_tokens=100)
            text = list(range(100))

            def choose(sampler: Sampler = sampler, text: list[int] = text) -> None:
                text.append(sampler.choose(logits, text))

            label = f"{name}, {'plain' if kind is Sampler else 'oblivious'}"
            found["sampler_ms"][label] = least_ms(choose)
    for section in ("embedding_ms", "sampler_ms"):
        for label, milliseconds in found[section].items():
            print(f"{section.removesuffix('_ms'):10} {label:28} {milliseconds:10.3f} ms")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
