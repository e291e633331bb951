"""What passes through one model take on this machine, and what is in them: ``docs/scaling.md`` §2."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from rich.console import Console

from tsqp.api.llm import LLM
from tsqp.bench.product_times import Products
from tsqp.bench.teams import shards_of, team, threads_of
from tsqp.bench.trusted_times import PassTime, alone, pass_time, private, private_over_tcp
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.constants import (
    FEW_ROWS,
    Constants,
    Device,
    NumberTimes,
    PrivateMode,
    ProductTimes,
    TransportKind,
    Trusted,
)
from tsqp.plan.passes import Model, attention_flop, cache_bytes, calls_of, numbers_by_part, numbers_of, weights_of

PROMPT, LONG_PROMPT = 256, 1024  # tokens
SHORT, LONG = 64, 4096  # tokens in the caches of steps
STEPS = 4  # as many of a step as of a prompt, for each run
NOTHING = ProductTimes(0.0, 0.0, 0.0, 0.0)
NO_CALLS = {"step": 0.0, "shm": 0.0, "tcp": 0.0, "team_shm": 0.0, "team_tcp": 0.0}
UNKNOWN = Trusted(
    call_s=NO_CALLS,  # type: ignore[arg-type]
    further_call_s={"shm": 0.0, "tcp": 0.0},
    number_s={"masked": NumberTimes(0.0, 0.0), "verified": NumberTimes(0.0, 0.0)},
    dot_s=0.0,
    byte_s=0.0,
    plain_byte_s=0.0,
    team_byte_s=0.0,
    flop_s=0.0,
    cache_byte_s=0.0,
    pad_weight_s=0.0,
    pad_number_s=0.0,
    alone_flop_s=0.0,
    alone=NOTHING,
)
ALONE = Team()
LINKS: dict[TransportKind, Link] = {"shm": Link(None), "tcp": Link(1e12)}  # on one machine


@dataclass(frozen=True)
class Passes:
    """Steps of one sequence and of 16 after SHORT tokens, and a prompt of PROMPT."""

    one: PassTime
    few: PassTime
    prompt: PassTime


@dataclass(frozen=True)
class LongPasses:
    """A step of one sequence after SHORT tokens and after LONG, prompts of PROMPT and of LONG_PROMPT."""

    short: PassTime
    long: PassTime
    prompt: PassTime
    long_prompt: PassTime


class Probe:
    """One model."""

    def __init__(self, model: str, runs: int, console: Console) -> None:
        self.config: ModelConfig = open_checkpoint(locate(model)).config
        self.calls = calls_of(self.config)
        self._model, self._runs, self._console = model, runs, console

    def passes(self, mode: PrivateMode) -> Passes:
        """Over shm, one worker."""
        with private(self._model, mode, PROMPT, self._console) as llm:
            return Passes(self._step(llm), self._step(llm, FEW_ROWS), self._prompt(llm, PROMPT))

    def long_passes(self) -> LongPasses:
        """At verified: attention is that of masked, and there are no pads to make first."""
        with private(self._model, "verified", PROMPT, self._console) as llm:
            prompts = (self._prompt(llm, tokens) for tokens in (PROMPT, LONG_PROMPT))
            return LongPasses(self._step(llm), self._step(llm, context=LONG), *prompts)

    def passes_alone(self) -> Passes:
        """Where everything runs here."""
        with alone(self._model, self._console) as llm:
            return Passes(self._step(llm), self._step(llm, FEW_ROWS), self._prompt(llm, PROMPT))

    def step_in_python(self) -> PassTime:
        """A masked step over shm that is not compiled."""
        with private(self._model, "masked", PROMPT, self._console, compiled=False) as llm:
            return self._step(llm)

    def over_tcp(self) -> tuple[PassTime, PassTime]:
        """A masked step and a prompt over tcp with keys."""
        with private_over_tcp(self._model, "masked", PROMPT, self._console) as llm:
            return self._step(llm), self._prompt(llm, PROMPT)

    def by_team(self, of: Team, transport: TransportKind) -> tuple[PassTime, PassTime]:
        """A masked step and a prompt by a team that a roster names."""
        shards, threads = shards_of(self.config, of), threads_of(of.columns)
        with team(self._model, shards, "masked", transport, PROMPT, self._console, threads=threads) as llm:
            return self._step(llm), self._prompt(llm, PROMPT)

    def products(self, one_s: float, few_s: float, many_s: float) -> Products:
        """Seconds of all products of passes with what is in them."""
        layers, head = weights_of(self.config)
        numbers = sum(numbers_by_part(self.config)[0])
        return Products(self.calls, layers, head, numbers, PROMPT, one_s, few_s, many_s)

    @property
    def numbers(self) -> int:
        """Numbers of a row, in and out."""
        return sum(numbers_of(self.config))

    @property
    def prompt_numbers(self) -> int:
        """Numbers of a prompt: of the LM head those of its last row."""
        layers, head = numbers_by_part(self.config)
        return PROMPT * sum(layers) + sum(head)

    @property
    def prompt_rows(self) -> int:
        """Rows of all calls of a prompt."""
        return PROMPT * (self.calls - 1) + 1

    def prompt_flop(self, tokens: int) -> int:
        """Of the attention of a prompt."""
        return attention_flop(self.config, tokens)

    def keys(self, tokens: int) -> int:
        """Bytes of their keys and values."""
        return tokens * cache_bytes(self.config)

    def explained_s(self, known: Trusted) -> float:
        """Of a prompt over shm: its calls and attention."""
        return self.calls * known.call_s["shm"] + self.prompt_flop(PROMPT) * known.flop_s / cores()

    def shared_numbers(self, batch: int) -> float:
        """Numbers of a step, each divided by the cores that share it: what a plan multiplies by ``few``."""
        ones = msgspec.structs.replace(UNKNOWN, number_s={"masked": NumberTimes(1.0, 1.0)})
        return self._model_of(ones, LINKS["shm"], Team(), batch).decode().numbers

    def rest_of_step(self, step: PassTime, known: Trusted, transport: TransportKind, of: Team = ALONE) -> float:
        """Seconds of a masked step of one row that constants do not explain; the products are not looked at."""
        planned = self._model_of(known, LINKS[transport], of, 1)
        return max(0.0, step.trusted - planned.decode().trusted)

    def _model_of(self, trusted: Trusted, link: Link, chosen: Team, batch: int) -> Model:
        device = Device("", cores(), None, {"masked": NOTHING})
        constants = Constants("constants", cores(), trusted, {"cpu": device}, {})
        setting = Setting(self.config, "masked", link, cores(), "cpu", batch=batch, prompt=SHORT)
        return Model(constants, setting, chosen)

    def _step(self, llm: LLM, batch: int = 1, context: int = SHORT) -> PassTime:
        return pass_time(llm, [1] * batch, context, STEPS * self._runs)

    def _prompt(self, llm: LLM, tokens: int) -> PassTime:
        return pass_time(llm, [tokens], 0, self._runs)
