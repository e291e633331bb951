"""``bench offload``: does the split pay? What the whole model takes on the trusted side, over what is left there.

A case is one prefill, or decode steps after a context. Each is measured in three ways on the same threads: the whole
model at ``local`` in bfloat16, the same in int8, and ``masked`` with pads ready and its caches in bfloat16; short ones
of one sequence also in llama.cpp, which many would run in place of a split. Of a masked pass the trusted side's
own time is what the pass takes but for the worker's kernels, as if the worker were infinitely fast: with the worker
on the same cores no other part can be told apart. (With ``--device cuda`` it has a device of its own.) Making pads is
measured apart, since it happens ahead of time.

Decode begins with caches of random keys and values: what a step takes does not depend on them, and the prompts of
sixteen long sequences would take longer than everything else here.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.llm import LLM
from tsqp.api.pads import pool_bytes
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.secret_memory import secret_memory
from tsqp.bench.ceilings import ceilings, higher, print_ceilings
from tsqp.bench.device import check_device
from tsqp.bench.llama_cpp import LlamaCppPeer
from tsqp.bench.machine import machine
from tsqp.bench.names import PEER_PACKAGES
from tsqp.bench.opened import in_bfloat16, opened
from tsqp.bench.pads import drain, pads_of, ready_for
from tsqp.bench.peer import Peer
from tsqp.bench.progress import watched
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.errors import OptionError
from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache
from tsqp.trusted.filler import SPARE_BYTES
from tsqp.trusted.guard.pool import MAKE_BLOCKS
from tsqp.trusted.stats import total

MODELS = {"1b": "synthetic:llama-3.2-1b", "8b": "synthetic:llama-3.1-8b", "default": "default"}
LOCAL, LOCAL_INT8, MASKED = "local", "local_int8", "masked"  # the ways, and the names of their times
LLAMA_CPP = "llama_cpp"
LONGEST = 1024  # tokens that llama.cpp is given: its prebuilt package takes seconds for them
TOGETHER = {"8b": ((LOCAL,), (LOCAL_INT8,), (MASKED,))}  # what takes turns: of such a model memory holds one
ALL_TOGETHER = ((LOCAL, LOCAL_INT8, MASKED),)
KV_BYTES = 2  # of a key or a value in bfloat16


@dataclass(frozen=True)
class Case:
    """``rows`` new tokens of each of ``sequences``, after ``context`` tokens; ``model`` is a key of MODELS."""

    name: str
    model: str
    sequences: int
    rows: int
    context: int

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step."""
        return self.rows == 1

    @property
    def peered(self) -> bool:
        """Whether llama.cpp is measured as well."""
        return self.sequences == 1 and max(self.rows, self.context) <= LONGEST and self.model not in TOGETHER

    @property
    def tokens(self) -> int:
        """New tokens of one pass, which each take a pad in every group of the layers."""
        return self.sequences * self.rows


CASES = (
    Case("prefill-1b-1024", "1b", 1, 1024, 0),
    Case("prefill-1b-4096", "1b", 1, 4096, 0),
    Case("decode-1b", "1b", 1, 1, 1024),
    Case("decode-1b-16", "1b", 16, 1, 1024),
    Case("decode-1b-16-256", "1b", 16, 1, 256),
    Case("decode-1b-8192", "1b", 1, 1, 8192),
    Case("prefill-8b-256", "8b", 1, 256, 0),
    Case("decode-8b", "8b", 1, 1, 1024),
    Case("prefill-default-1024", "default", 1, 1024, 0),
    Case("prefill-default-4096", "default", 1, 4096, 0),
    Case("decode-default", "default", 1, 1, 1024),
    Case("decode-default-16", "default", 16, 1, 1024),
)


@dataclass(frozen=True)
class Effort:
    """``runs`` passes of a prefill; of decode ``runs`` times ``steps``. One more of each warms up.

    ``device`` is the worker's; the trusted side computes on the CPU.
    """

    runs: int
    steps: int
    threads: int | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Raises OptionError."""
        for name, value in (("runs", self.runs), ("steps", self.steps)):
            if value < 1:
                raise OptionError(f"--{name} must be at least 1, not {value}")
        check_device(self.device)


def chosen(names: Sequence[str]) -> tuple[Case, ...]:
    """The cases asked for, all when none was. Raises OptionError."""
    unknown = sorted(set(names) - {case.name for case in CASES})
    if unknown:
        raise OptionError(f"unknown case '{unknown[0]}': use {', '.join(case.name for case in CASES)}")
    return tuple(case for case in CASES if not names or case.name in names)


def bench_offload(cases: Sequence[Case], effort: Effort, console: Console) -> dict[str, Any]:
    """The cases, model by model. Raises OptionError and every error of ``LLM``."""
    effort.check()
    threads = effort.threads or cores()
    rates = ceilings("bfloat16", "cpu", threads)
    print_ceilings(rates, console)
    rows: dict[str, dict[str, Any]] = {}
    for model, place in MODELS.items():
        own = [case for case in cases if case.model == model]
        if own:
            config = open_checkpoint(locate(place)).config
            times = _measured(own, TOGETHER.get(model, ALL_TOGETHER), effort, console)
            rows |= {case.name: _row(case, config, times[case.name]) for case in own}
    rates = higher(rates, ceilings("bfloat16", "cpu", threads))
    for case in cases:
        row = rows[case.name]
        row["limit_s"] = row["guard_bytes"] / rates["weight_read_bytes_per_s"]
        row["limit_s"] += row["attention_flop"] / rates["gemm_flop_per_s"]
    here = machine()
    return {
        "benchmark": "offload",
        "runs": effort.runs,
        "decode_steps": effort.steps,
        "threads": threads,
        "device": effort.device,
        "cases": [{**rows[case.name], "runs": effort.runs, "commit": here["commit"]} for case in cases],
        "ceilings": rates,
        "machine": here,
    }


Times = dict[str, list[float]]  # seconds of every pass, by figure


def _measured(
    cases: Sequence[Case], turns: Iterable[Iterable[str]], effort: Effort, console: Console
) -> Mapping[str, Times]:
    """The times of each case; the ways of one turn are open together and run in alternation."""
    found: Mapping[str, Times] = {case.name: defaultdict(list) for case in cases}
    for ways in turns:
        _measure_turn(cases, ways, effort, found, console)
        gc.collect()  # weights are gigabytes, and the next ones come; nothing here refers to them any more
    return found


def _measure_turn(
    cases: Sequence[Case], ways: Iterable[str], effort: Effort, found: Mapping[str, Times], console: Console
) -> None:
    """Adds the times of some ways to ``found``."""
    room = max(case.tokens for case in cases)
    with ExitStack() as stack:
        models = {way: stack.enter_context(_open(way, cases[0], room, effort, console)) for way in ways}
        peer = _open_peer(cases, effort, stack, console)
        for case in cases:
            for warm in watched(range(-1, effort.runs), console, case.name):
                for way, llm in models.items():
                    times = _passes(way, llm, case, effort.steps if case.decodes else 1)
                    for figure, seconds in times.items() if warm >= 0 else ():
                        found[case.name][figure] += seconds
                if peer is not None and case.peered:
                    seconds_of_peer = _peer_seconds(peer, case, effort.steps)
                    found[case.name][LLAMA_CPP] += [seconds_of_peer] if warm >= 0 else []
        if MASKED in models:
            for row_s in (_pad_row_seconds(models[MASKED]) for _ in range(effort.runs)):
                for case in cases:
                    found[case.name]["pads"].append(_pads_seconds(models[MASKED].config, case, row_s))


def _open(way: str, case: Case, room: int, effort: Effort, console: Console) -> LLM:
    """A model in one of the ways; for ``masked`` the pool has room for ``room`` tokens."""
    run = RunConfig(MODELS[case.model], "local", compute=ComputeConfig(threads=effort.threads))
    if way == LOCAL_INT8:
        return opened(replace(run, compute=replace(run.compute, dtype="int8")), console)
    if way == MASKED:
        memory = pool_bytes(open_checkpoint(locate(run.model)).config, room)
        guard = GuardConfig(pads_ahead=room, pad_memory=memory)
        run = replace(run, protection="masked", guard=guard, worker=WorkerConfig(device=effort.device))
    return opened(in_bfloat16(run), console)


def _open_peer(cases: Sequence[Case], effort: Effort, stack: ExitStack, console: Console) -> LlamaCppPeer | None:
    """llama.cpp with 8-bit weights, where it is installed and one of the cases is for it."""
    if not any(case.peered for case in cases) or importlib.util.find_spec(PEER_PACKAGES["llama.cpp"]) is None:
        return None
    model, work = locate(MODELS[cases[0].model]), Workload(LONGEST, effort.steps, effort.runs)
    return stack.enter_context(LlamaCppPeer(model, "int8", work, effort.threads or cores(), console))


def _peer_seconds(peer: Peer, case: Case, steps: int) -> float:
    """A prefill, or one decode step after the context."""
    if case.decodes:
        return peer.run([7] * case.context, steps)[1] / steps
    return peer.run([7] * case.rows, 0)[0]


def _passes(way: str, llm: LLM, case: Case, steps: int) -> Times:
    """The times of ``steps`` passes over new caches; of ``masked`` also what is left without the worker's kernels."""
    engine, stats = llm.engine, llm.stats
    caches = [filled(engine.decoder.new_cache(), llm.config, case.context) for _ in range(case.sequences)]
    tokens = [[7] * case.rows for _ in range(case.sequences)]
    times: Times = {way: []} if way != MASKED else {way: [], "trusted": []}
    for _ in range(steps):
        if way == MASKED:
            ready_for(llm, case.tokens, case.sequences)
        stats.reset()
        start = time.perf_counter()
        engine.run(Batch(tokens, caches))
        seconds = time.perf_counter() - start
        times[way].append(seconds)
        if way == MASKED:
            times["trusted"].append(seconds - total(stats.calls.values()).worker_s)
    return times


def filled(cache: KVCache, config: ModelConfig, positions: int) -> KVCache:
    """A cache that holds so many random keys and values."""
    if positions:
        for layer in range(config.num_layers):
            for held in cache.reserve(layer, positions):
                held[:, :positions].normal_()
        cache.advance(positions)
    return cache


def _pad_row_seconds(llm: LLM) -> dict[str, float]:
    """Making the pads of one row of each group, as the filler does in idle time: many rows at once, each checked."""
    ready_for(llm, 0, 0)  # the filler itself makes none meanwhile, nor afterwards
    secret_memory().give_back(keep=SPARE_BYTES)  # or the filler would, beside what is timed
    pool, _ = pads_of(llm)
    found: dict[str, float] = {}
    for name in linear_groups(llm.config):
        start = time.perf_counter()
        pool.make((name, None if name == "lm_head" else 0), MAKE_BLOCKS)
        found[name] = (time.perf_counter() - start) / (MAKE_BLOCKS * BLOCK_ROWS)
    drain(pool)
    return found


def _pads_seconds(config: ModelConfig, case: Case, row_s: Mapping[str, float]) -> float:
    """The pads of one pass: a row of each group of the layers for every token, one of the head for every sequence."""
    layers = config.num_layers * sum(seconds for name, seconds in row_s.items() if name != "lm_head")
    return case.tokens * layers + case.sequences * row_s["lm_head"]


def _row(case: Case, config: ModelConfig, times: Times) -> dict[str, Any]:
    """One case: medians in seconds, of decode for one step of all sequences, and how often they hold each other."""
    medians = {f"{figure}_s": statistics.median(seconds) for figure, seconds in times.items()}
    trusted_s, with_pads_s = medians["trusted_s"], medians["trusted_s"] + medians["pads_s"]
    return {
        "name": case.name,
        "model": MODELS[case.model],
        "sequences": case.sequences,
        "tokens": case.rows,
        "context": case.context,
        **medians,
        "gain": medians["local_s"] / trusted_s,
        "gain_int8": medians["local_int8_s"] / trusted_s,
        "gain_tee": medians["local_s"] / with_pads_s,
        "gain_tee_int8": medians["local_int8_s"] / with_pads_s,
        **({"gain_llama_cpp": medians[f"{LLAMA_CPP}_s"] / trusted_s} if LLAMA_CPP in times else {}),
        "guard_bytes": guard_bytes(config, case),
        "attention_flop": attention_flop(config, case),
        "alternation": case.model not in TOGETHER,
        "all_seconds": times,
    }


def guard_bytes(config: ModelConfig, case: Case) -> int:
    """The bytes that the trusted side of one pass cannot do without.

    For each row of a group with K inputs and N outputs: x' is written, y' is read and r·Wq is read, 4·(K + 2·N). For
    each layer and sequence of a decode step its keys and values are read once; a prefill reads them from its caches.
    """
    groups = linear_groups(config)
    of_row = {name: 4 * (group.in_features + 2 * group.out_features) for name, group in groups.items()}
    head = of_row.pop("lm_head")
    masked = case.tokens * config.num_layers * sum(of_row.values()) + case.sequences * head
    held = 2 * config.num_layers * config.num_kv_heads * config.head_dim * KV_BYTES
    return masked + (case.sequences * case.context * held if case.decodes else 0)


def attention_flop(config: ModelConfig, case: Case) -> int:
    """Multiplications and additions of q·Kᵀ and p·V: 4 for each query, key that it sees, head and column."""
    seen = sum(case.context + row + 1 for row in range(case.rows))
    return 4 * config.num_layers * config.num_heads * config.head_dim * case.sequences * seen
