"""``bench constants``: what ``tsqp plan`` computes from, measured on this machine. ``docs/scaling.md`` §2.

Two models are measured. Calls and rows weigh more in the narrow one, numbers and weights in the wide one, so that what
each costs follows from both. What is made in Python, alone or in a team, is measured by the wide one: its products
leave no cache warm, as those of any large model. A constant is what a pass takes beyond what those known by then say.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.arith.quantise import Int8Weights
from tsqp.arith.self_test import pick_kernel
from tsqp.bench.guard import digits_of, dots_seconds, elements_of
from tsqp.bench.machine import machine
from tsqp.bench.probe import LONG, LONG_PROMPT, PROMPT, SHORT, STEPS, UNKNOWN, LongPasses, Passes, Probe
from tsqp.bench.product_times import fitted, least_seconds, solved
from tsqp.bench.rpc import FullCall, server
from tsqp.bench.trusted_times import PassTime
from tsqp.config.groups import GroupKey
from tsqp.cores import cores
from tsqp.plan.cluster import Team
from tsqp.plan.constants import (
    FEW_ROWS,
    CallKind,
    Constants,
    Device,
    NumberTimes,
    PrivateMode,
    ProductTimes,
    TransportKind,
    Trusted,
)
from tsqp.plan.pads import PAD_ROWS
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.transport import connect

DEEP, WIDE = "synthetic:smollm2-135m", "synthetic:llama-3.2-1b-4-layers"
PAD_SHAPE = 8192, 2048
VECTORS = 2
FULL_BYTES = 8 << 20
MODES: tuple[PrivateMode, ...] = ("masked", "verified")
TEAM_CALLS: dict[TransportKind, CallKind] = {"shm": "team_shm", "tcp": "team_tcp"}
LAYERS, COLUMNS = Team(layers=2), Team(columns=2)  # each call goes to one worker of the former, to both of the latter


def bench_constants(runs: int, console: Console, deep: str = DEEP, wide: str = WIDE) -> dict[str, Any]:
    """All of them, the least of ``runs`` each and more of what is short. Raises OptionError, every error of ``LLM``."""
    torch.set_num_threads(cores())
    narrow, wider = Probe(deep, runs, console), Probe(wide, runs, console)
    passes = {mode: (narrow.passes(mode), wider.passes(mode)) for mode in MODES}
    known = attention(wider, wider.long_passes(), UNKNOWN)
    steps = {mode: numbers_and_call(narrow, wider, *passes[mode], known) for mode in MODES}
    numbers = {mode: one for mode, (one, _) in steps.items()}
    known = msgspec.structs.replace(
        known,
        number_s=numbers,
        dot_s=cores() * dots_seconds(PROMPT, 2048, VECTORS, runs) / (PROMPT * 2048 * VECTORS),
    )
    known = calls_in_python(wider, passes["masked"][1], known, steps["masked"][1])
    numbers = {mode: with_prompts(numbers[mode], narrow, wider, *passes[mode], known) for mode in MODES}
    products = {mode: worker_products(narrow, wider, *passes[mode]) for mode in MODES}
    by_itself = [one.passes_alone() for one in (narrow, wider)]
    known = msgspec.structs.replace(
        known,
        number_s=numbers,
        plain_byte_s=plain_byte_s(runs),
        pad_weight_s=cores() * (products["masked"].many_s + products["masked"].weight_s / PAD_ROWS),
        pad_number_s=cores() * (pad_number_s(runs) + products["masked"].number_s),
        alone_flop_s=cores() * by_itself[1].prompt.attention / wider.prompt_flop(PROMPT),
        alone=products_alone(narrow, wider, *by_itself),
    )
    here = machine()
    device = Device(source_of(here), cores(), None, products)
    return dict(msgspec.to_builtins(Constants("constants", cores(), known, {"cpu": device}, here)))


def source_of(here: dict[str, str | int]) -> str:
    """Where and when a device was measured that is this machine: the same in whatever file it is kept."""
    return f"tsqp bench constants on {here['cpu']}, {here['date']}, commit {here['commit']}"


def attention(probe: Probe, passes: LongPasses, known: Trusted) -> Trusted:
    """With attention: what longer contexts and prompts take more. What is in short ones too is other constants'."""
    more_s = passes.long.trusted - passes.short.trusted
    more_of_prompt_s = passes.long_prompt.attention - passes.prompt.attention
    more_flop = probe.prompt_flop(LONG_PROMPT) - probe.prompt_flop(PROMPT)
    return msgspec.structs.replace(
        known,
        cache_byte_s=cores() * max(0.0, more_s) / probe.keys(LONG - SHORT),
        flop_s=cores() * max(0.0, more_of_prompt_s) / more_flop,
    )


def numbers_and_call(
    narrow: Probe, wider: Probe, narrow_passes: Passes, wide_passes: Passes, known: Trusted
) -> tuple[NumberTimes, float]:
    """What numbers of steps take, and seconds of a call of a compiled step; ``known`` has attention."""
    cache_s = known.cache_byte_s / cores()
    more_s = wide_passes.few.trusted - wide_passes.one.trusted - (FEW_ROWS - 1) * wider.keys(SHORT) * cache_s
    few = max(0.0, more_s) / (wider.shared_numbers(FEW_ROWS) - wider.shared_numbers(1))
    call_s, of_one_row = solved(
        *(
            (one.calls, one.numbers, passes.one.trusted - one.keys(SHORT) * cache_s)
            for one, passes in ((narrow, narrow_passes), (wider, wide_passes))
        )
    )
    return NumberTimes(few, 0.0, 0.0, max(0.0, of_one_row - few)), call_s


def with_prompts(
    numbers: NumberTimes, narrow: Probe, wider: Probe, narrow_passes: Passes, wide_passes: Passes, known: Trusted
) -> NumberTimes:
    """With what numbers and rows of prompts take; ``known`` has attention and calls. All cores share the numbers."""
    many, row = solved(
        *(
            (one.prompt_numbers / cores(), one.prompt_rows, passes.prompt.trusted - one.explained_s(known))
            for one, passes in ((narrow, narrow_passes), (wider, wide_passes))
        )
    )
    return NumberTimes(numbers.few, many, row, numbers.once)


def calls_in_python(probe: Probe, passes: Passes, known: Trusted, step_s: float) -> Trusted:
    """With calls of all kinds and bytes; ``known`` has numbers, ``step_s`` is a call of a compiled step."""
    calls: dict[CallKind, float] = {"step": step_s}
    calls["shm"] = probe.rest_of_step(probe.step_in_python(), known, "shm") / probe.calls

    def call_and_byte(step: PassTime, prompt: PassTime, transport: TransportKind) -> tuple[float, float]:
        more_s = max(0.0, prompt.trusted - passes.prompt.trusted) + probe.calls * calls["shm"]
        return solved(
            (probe.calls, 4 * probe.numbers, probe.rest_of_step(step, known, transport)),
            (probe.calls, 4 * probe.prompt_numbers, more_s),
        )

    calls["tcp"], byte_s = call_and_byte(*probe.over_tcp(), "tcp")
    calls["team_shm"], team_byte_s = call_and_byte(*probe.by_team(LAYERS, "shm"), "shm")
    known = msgspec.structs.replace(known, byte_s=byte_s, team_byte_s=team_byte_s)
    calls["team_tcp"] = probe.rest_of_step(probe.by_team(LAYERS, "tcp")[0], known, "tcp", LAYERS) / probe.calls
    further: dict[TransportKind, float] = {}
    for transport, kind in TEAM_CALLS.items():
        rest_s = probe.rest_of_step(probe.by_team(COLUMNS, transport)[0], known, transport, COLUMNS)
        # A line costs no less than none: over tcp the difference may be lost in the noise of what enciphers.
        further[transport] = max(further.get("shm", 0.0), rest_s / probe.calls - calls[kind])
    return msgspec.structs.replace(known, call_s=calls, further_call_s=further)


def worker_products(narrow: Probe, wider: Probe, narrow_passes: Passes, wide_passes: Passes) -> ProductTimes:
    """Of the worker, by what it says of itself."""
    both = ((narrow, narrow_passes), (wider, wide_passes))
    return fitted(*(one.products(had.one.worker, had.few.worker, had.prompt.worker) for one, had in both))


def products_alone(narrow: Probe, wider: Probe, narrow_passes: Passes, wide_passes: Passes) -> ProductTimes:
    """Of this side where everything runs here, with norms and the like; attention of prompts is not in it."""
    both = ((narrow, narrow_passes), (wider, wide_passes))
    return fitted(
        *(one.products(had.one.whole, had.few.whole, had.prompt.whole - had.prompt.attention) for one, had in both)
    )


def plain_byte_s(runs: int) -> float:
    """A byte over tcp without keys, beyond the two copies that any line makes."""
    with ExitStack() as stack:
        address, _ = stack.enter_context(server("tcp"))
        work = FullCall(stack.enter_context(closing(connect(address))), FULL_BYTES)
        calls = STEPS * runs
        return max(0.0, least_seconds([work.run], calls) - least_seconds([work.two_copies], calls)) / (2 * FULL_BYTES)


def pad_number_s(runs: int) -> float:
    """Pads of a number of x and y, but for their product: keys expanded, products checked and copied."""
    out, wide = PAD_SHAPE
    key: GroupKey = ("gate_up", 0)
    scales, kernel = torch.ones(out), pick_kernel(torch.device("cpu"))
    group = GuardedGroup.of(key, Int8Weights(digits_of(out, wide), scales, None), kernel, checks=VECTORS)
    pads, products = elements_of(PAD_ROWS, wide), np.empty((PAD_ROWS, out), np.uint32)
    if group.weights is None:
        raise ValueError("the group has no weights to multiply by")
    group.weights.product(torch.from_numpy(pads.view(np.int32)), 4, out=torch.from_numpy(products.view(np.int32)))
    room = np.empty_like(pads)

    def make() -> None:
        for first in range(0, PAD_ROWS, BLOCK_ROWS):
            expand(AesKeyStream(os.urandom(KEY_BYTES)), room[first : first + BLOCK_ROWS])
        group.check_products(pads, products)
        products.copy()

    return least_seconds([make], STEPS * runs) / (PAD_ROWS * (out + wide))
