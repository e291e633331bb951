"""``bench serve``: many streams at once. How much more sixteen give than one, what a long prompt does to them, and what
a second turn costs; on the engine, without HTTP.

``open`` in bfloat16 and ``masked`` with pads ready take turns, beside the same batch in transformers, and in
llama.cpp's server with as many slots, in bfloat16 and with 8-bit weights. A rate is tokens a second of all streams
together, after their first tokens. A gap is the time between two tokens of one stream, which is that of a step.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.api.llm import LLM
from tsqp.bench.ceilings import seconds_of
from tsqp.bench.device import check_device
from tsqp.bench.installed_peers import llama_cpp_peers, transformers_peer
from tsqp.bench.latency import percentile
from tsqp.bench.load_setup import MOST_STREAMS
from tsqp.bench.machine import machine
from tsqp.bench.modes import chosen_modes, in_mode
from tsqp.bench.opened import opened
from tsqp.bench.pads import ready_for
from tsqp.bench.progress import steps
from tsqp.bench.workload import Workload
from tsqp.cores import cores
from tsqp.errors import OptionError
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.pace import LEAST_ROWS
from tsqp.trusted.engine.request import Output
from tsqp.trusted.engine.sampling_params import SamplingParams

TURN = 32  # tokens of an answer, and of the message after it
LATER = 0.95  # of all gaps, those that are no longer than the one that counts


@dataclass(frozen=True)
class Traffic:
    """``streams`` prompts of ``tokens``, and ``steps`` tokens after each first one; a prompt of ``long`` tokens that
    arrives while ``beside`` answers go on; a conversation whose first prompt has ``turn`` tokens. All ``runs`` times.
    """

    streams: int = 16
    tokens: int = 64
    steps: int = 32
    beside: int = 4
    long: int = 2000
    turn: int = 2000
    runs: int = 3

    def check(self) -> None:
        """Raises OptionError."""
        for name, value in asdict(self).items():
            least = 2 if name == "streams" else 1
            if value < least:
                raise OptionError(f"--{name} must be at least {least}, not {value}")
        for name, value, most in (("streams", self.streams, MOST_STREAMS), ("beside", self.beside, MOST_STREAMS - 1)):
            if value > most:  # the rest would wait
                raise OptionError(f"--{name} must be at most {most}, not {value}")


Decode = Callable[[list[list[int]], int], float]  # prompts and steps: tokens a second, of all together
Samples = dict[str, dict[str, list[float]]]  # by who, and by the number of streams or by figure: of every run


def bench_serve(run: RunConfig, traffic: Traffic, console: Console, only: str | None = None) -> dict[str, Any]:
    """Everything, or ``only`` one of the two modes without peers. Raises OptionError and every error of ``LLM``."""
    traffic.check()
    check_device(run.worker.device)
    chosen = chosen_modes(only)
    rates: Samples = defaultdict(lambda: defaultdict(list))
    found: Samples = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        modes = {mode: stack.enter_context(opened(in_mode(run, mode), console)) for mode in chosen}
        everyone = {mode: _ours(llm) for mode, llm in modes.items()}
        if only is None:
            everyone |= _peers(run, traffic, stack, console)
        total = 2 * (traffic.runs + 1) * len(everyone) + 2 * traffic.runs * len(modes)
        bar = stack.enter_context(steps(console, total))
        for warm in range(-1, traffic.runs):
            for name, decode in everyone.items():
                for streams in (1, traffic.streams):
                    bar.begin(f"{name}: {streams} at once")
                    rate = decode(_prompts(streams, traffic.tokens), traffic.steps)
                    rates[name][str(streams)] += [rate] if warm >= 0 else []
                    bar.done()
        for _ in range(traffic.runs):
            for mode, llm in modes.items():
                for what, measured in (("a long prompt", _gaps), ("a second turn", _turns)):
                    bar.begin(f"{mode}: {what}")
                    for figure, seconds in measured(llm, traffic).items():
                        found[mode][figure].append(seconds)
                    bar.done()
    return {
        "benchmark": "serve",
        "model": run.model,
        "transport": "shm",
        "device": run.worker.device,
        "threads": run.compute.threads or cores(),
        **asdict(traffic),
        "rates": {name: _of_rates(own, traffic.streams) for name, own in rates.items()},
        "gaps": {mode: _of_seconds(own, ("gap_alone_s", "gap_beside_s", "prompt_s")) for mode, own in found.items()},
        "turns": {mode: _of_seconds(own, ("first_turn_s", "second_turn_s")) for mode, own in found.items()},
        "machine": machine(),
    }


def _prompts(count: int, tokens: int) -> list[list[int]]:
    """Prompts that have nothing in common, of tokens below 256."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randint(0, 256, (tokens,), generator=generator).tolist() for _ in range(count)]


def _ours(llm: LLM) -> Decode:
    """Decode steps of the engine, with pads ready."""

    def decode(prompts: list[list[int]], steps: int) -> float:
        engine, answers = llm.engine, len(prompts) * (steps + 2)
        ready_for(llm, sum(map(len, prompts)) + answers, answers)
        # Nobody follows the answers: none of them goes on while a prompt is left.
        _begun(engine, prompts, SamplingParams(max_tokens=steps + 2, ignore_eos=True), patient=True)
        given, start = engine.counts().new_tokens, time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds, given = time.perf_counter() - start, engine.counts().new_tokens - given
        _run_out(llm)
        return given / seconds

    return decode


def _begun(engine: Engine, prompts: list[list[int]], params: SamplingParams, *, patient: bool = False) -> list[int]:
    """The numbers of new answers, each of which has its first token."""
    answers = [list[Output]() for _ in prompts]
    numbers = [
        engine.add_request(prompt, params, patient=patient, deliver=answer.append)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    while not all(answers):
        engine.step()
    return numbers


def _peers(run: RunConfig, traffic: Traffic, stack: ExitStack, console: Console) -> dict[str, Decode]:
    """Those that are installed and can have the model, by name."""
    found: dict[str, Decode] = {}
    peer = transformers_peer(run, stack, console)
    if peer is not None:
        found[peer.name] = lambda prompts, steps: len(prompts) * steps / peer.run_together(prompts, steps)[1]
    work = Workload(traffic.tokens, traffic.steps, traffic.runs)
    servers = llama_cpp_peers(run, work, traffic.streams, stack, console)
    return found | {server.name: server.rate for server in servers}


def _gaps(llm: LLM, traffic: Traffic) -> dict[str, float]:
    """Seconds between two tokens of answers that go on: of 20 gaps the longest but one, alone and while the long
    prompt is computed; and how long that takes.
    """
    engine, alone = llm.engine, 2 * traffic.steps
    # How many steps the prompt takes is not known: answers are longer than any number of them, and ended at last.
    params = SamplingParams(max_tokens=alone + traffic.long, ignore_eos=True)
    answers = traffic.beside * (alone + 1 + traffic.long // LEAST_ROWS)  # at most: what is left serves the next run
    ready_for(llm, traffic.beside * traffic.tokens + traffic.long + answers, answers + 1)
    numbers = _begun(engine, _prompts(traffic.beside, traffic.tokens), params)
    undisturbed = [seconds_of(engine.step) for _ in range(alone)]
    (prompt,) = _prompts(1, traffic.long)
    arrived = list[Output]()
    engine.add_request(prompt, SamplingParams(max_tokens=1, ignore_eos=True), deliver=arrived.append)
    beside = list[float]()
    while not arrived:
        beside.append(seconds_of(engine.step))
    for number in numbers:
        engine.abort(number)
    _run_out(llm)
    return {"gap_alone_s": _later(undisturbed), "gap_beside_s": _later(beside), "prompt_s": sum(beside)}


def _turns(llm: LLM, traffic: Traffic) -> dict[str, float]:
    """Seconds to the first token of a conversation's first answer, and of its second."""
    engine, (prompt, message) = llm.engine, (_prompts(1, count)[0] for count in (traffic.turn, TURN))
    engine.forget()
    times = []
    for _ in range(2):
        ready_for(llm, len(prompt) + TURN, TURN)
        answer = list[Output]()
        engine.add_request(prompt, SamplingParams(max_tokens=TURN, ignore_eos=True), salt="", deliver=answer.append)
        start = time.perf_counter()
        while not answer:
            engine.step()
        times.append(time.perf_counter() - start)
        _run_out(llm)
        prompt = [*prompt, *(output.token for output in answer if output.token is not None), *message]
    return {"first_turn_s": times[0], "second_turn_s": times[1]}


def _run_out(llm: LLM) -> None:
    while llm.engine.has_work():
        llm.engine.step()


def _later(seconds: list[float]) -> float:
    """The least that 95 of 100 do not exceed."""
    return percentile(seconds, LATER)


def _of_rates(own: Mapping[str, list[float]], streams: int) -> dict[str, Any]:
    """Medians in tokens a second, and how much more many streams give than one."""
    one, many = statistics.median(own["1"]), statistics.median(own[str(streams)])
    return {"one": one, "many": many, "ratio": many / one, "all": dict(own)}


def _of_seconds(own: Mapping[str, list[float]], figures: tuple[str, ...]) -> dict[str, Any]:
    """Medians in seconds, and the second figure over the first."""
    medians = {figure: statistics.median(own[figure]) for figure in figures}
    ratio = medians[figures[1]] / medians[figures[0]]
    return {**medians, "ratio": ratio, "all": {figure: own[figure] for figure in figures}}
