"""Generation: prompts in, tokens out. Drives the decoder with batches of sequences and keeps their caches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from tsqp.config.model import ModelConfig
from tsqp.errors import InputError, NumericError, PromptError
from tsqp.model.batch import Batch
from tsqp.model.pending import Steps, run
from tsqp.trusted.engine.sampling import Sampler
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.stats import Stats

Tokens = SequenceOf[int]


@dataclass(frozen=True)
class NewToken:
    """A token that was generated: the index of its prompt, and why the sequence ended with it, if it did."""

    sequence: int
    token: int
    finish_reason: str | None  # "stop": an end token (itself not part of the text); "length"; None: goes on


class PassDecoder(Protocol):
    """What the engine needs of a decoder; sequences are known by caches that the decoder makes."""

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self) -> Any: ...

    def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]: ...


class Sequence:
    """One prompt and its answer so far. ``cache`` is the decoder's; ``tokens`` are the prompt's and the answer's."""

    def __init__(self, index: int, prompt: Tokens, cache: Any, params: SamplingParams, sampler: Sampler) -> None:
        self.index = index
        self.tokens = list(prompt)
        self.cache = cache
        self.finished = False
        self._end = len(prompt) + params.max_tokens
        self._params = params
        self._sampler = sampler

    def extend(self, logits: torch.Tensor, eos_token_ids: Tokens, max_positions: int) -> NewToken:
        """Choose the next token from the logits after the last one, float32 (vocab_size,)."""
        token = self._sampler.choose(logits, self.tokens)
        self.tokens.append(token)
        reason = None
        if token in self._params.stop_token_ids or (token in eos_token_ids and not self._params.ignore_eos):
            reason = "stop"
        elif len(self.tokens) >= min(self._end, max_positions):
            reason = "length"
        self.finished = reason is not None
        return NewToken(self.index, token, reason)


@dataclass
class Engine:
    """Runs prompts through a decoder. ``eos_token_ids`` end a sequence unless it ignores them."""

    decoder: PassDecoder
    eos_token_ids: tuple[int, ...]
    stats: Stats
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _process: int = field(default_factory=os.getpid)

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def busy(self) -> bool:
        """Whether a forward pass is under way."""
        return self._one_at_a_time.locked()

    def check_prompt(self, prompt: Tokens) -> None:
        """Raises PromptError for a prompt that is empty, longer than the context or with unknown token ids."""
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token of text")
        if len(prompt) >= self.config.max_positions:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens; this model's context holds {self.config.max_positions}, "
                "the answer included: shorten the prompt"
            )
        if not all(0 <= token < self.config.vocab_size for token in prompt):
            raise PromptError(f"a token id is outside of the vocabulary of {self.config.vocab_size}")

    def logits(self, prompt: Tokens) -> torch.Tensor:
        """Logits after every token of one prompt, float32 (T, vocab_size): for quality tests."""
        self.check_prompt(prompt)
        return self.run(Batch([prompt], [self.decoder.new_cache()], every_row=True))

    def generate(
        self, prompts: Iterable[Tokens], params: SamplingParams, samplers: Iterable[Sampler] | None = None
    ) -> Generation:
        """All prompts together. Several generations may be open at once and take turns.

        ``samplers``: one for each prompt; made of ``params`` when not given.

        Raises PromptError before anything is sent.
        """
        prompts = list(prompts)
        for prompt in prompts:
            self.check_prompt(prompt)
        samplers = [Sampler(params) for _ in prompts] if samplers is None else samplers
        sequences = [
            Sequence(index, prompt, self.decoder.new_cache(), params, sampler)
            for index, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True))
        ]
        return Generation(self, sequences)

    def run(self, batch: Batch[Any]) -> torch.Tensor:
        """One forward pass; the passes of several threads take turns. Raises InputError in a forked process."""
        if os.getpid() != self._process:  # before anything that waits for a thread which the fork has left behind
            raise InputError("a model belongs to the process that opened it: open a new LLM after a fork")
        with self._one_at_a_time, torch.inference_mode():
            return run(self.decoder.forward(batch))


class Generation:
    """One batch under way: iterate over its tokens, in the order they come.

    Iterating raises NumericError and any ChannelError; tokens yielded before stand.
    """

    def __init__(self, engine: Engine, sequences: list[Sequence]) -> None:
        self._engine = engine
        self._live = sequences
        self._stopped: set[int] = set()

    def __iter__(self) -> Iterator[NewToken]:
        engine, prefill = self._engine, True
        while self._live:
            for sequence, logits in zip(self._live, self._forward(prefill=prefill), strict=True):
                engine.stats.new_tokens += 1
                yield sequence.extend(logits, engine.eos_token_ids, engine.config.max_positions)
            self._live = [one for one in self._live if not one.finished and one.index not in self._stopped]
            prefill = False

    def stop(self, sequence: int) -> None:
        """End one sequence early, for instance at a stop string."""
        self._stopped.add(sequence)

    def _forward(self, *, prefill: bool) -> torch.Tensor:
        """Logits (sequences, vocab_size) after the newest tokens of each sequence. Raises NumericError."""
        fresh = [one.tokens if prefill else one.tokens[-1:] for one in self._live]
        start = time.perf_counter()
        logits = self._engine.run(Batch(fresh, [one.cache for one in self._live]))
        if not np.isfinite(logits.numpy()).all():  # torch would wake a thread for each core
            raise NumericError(
                "the logits are not numbers: broken weights, too narrow a compute.dtype or a broken worker",
                fields=("compute.dtype",),
            )
        self._engine.stats.passed(start, time.perf_counter(), [len(tokens) for tokens in fresh], prefill=prefill)
        return logits
