"""Generation: prompts in, tokens out. Drives the decoder with batches of sequences and keeps their caches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tsqp.config.model import ModelConfig
from tsqp.errors import InputError, NumericError, PromptError
from tsqp.model.batch import Batch
from tsqp.model.pending import Steps, run
from tsqp.trusted.engine.sampling import Sampler
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.stats import Stats


@dataclass(frozen=True)
class NewToken:
    """A token that was generated: the index of its prompt, and why the sequence ended with it, if it did."""

    sequence: int
    token: int
    finish_reason: str | None  # "stop": an end token (itself not part of the text); "length"; None: goes on


class PassDecoder(Protocol):
    """What the engine needs of a decoder; sequences are known by caches that the decoder makes."""

    @property
    def spec(self) -> ModelConfig: ...

    def new_cache(self) -> Any: ...

    def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]: ...


@dataclass
class _Sequence:
    index: int
    tokens: list[int]
    cache: Any  # the decoder's
    sampler: Sampler
    generated: int = 0
    finished: bool = False


@dataclass
class Engine:
    """Runs prompts through a decoder. ``eos_token_ids`` end a sequence unless it ignores them."""

    decoder: PassDecoder
    eos_token_ids: tuple[int, ...]
    stats: Stats
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _process: int = field(default_factory=os.getpid)

    @property
    def spec(self) -> ModelConfig:
        return self.decoder.spec

    def busy(self) -> bool:
        """Whether a forward pass is under way."""
        return self._one_at_a_time.locked()

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises PromptError for a prompt that is empty, longer than the context or with unknown token ids."""
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token of text")
        if len(prompt) >= self.spec.max_positions:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens; this model's context holds {self.spec.max_positions}, "
                "the answer included: shorten the prompt"
            )
        if not all(0 <= token < self.spec.vocab_size for token in prompt):
            raise PromptError(f"a token id is outside of the vocabulary of {self.spec.vocab_size}")

    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """Logits after every token of one prompt, float32 (T, vocab_size): for quality tests."""
        self.check_prompt(prompt)
        return self._run(Batch([prompt], [self.decoder.new_cache()], every_row=True))

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generation:
        """All prompts together. Several generations may be open at once and take turns.

        Raises PromptError before anything is sent.
        """
        for prompt in prompts:
            self.check_prompt(prompt)
        return Generation(self, prompts, params)

    def extend(self, sequence: _Sequence, logits: torch.Tensor, params: SamplingParams) -> NewToken:
        """Choose the next token of a sequence from its logits (vocab_size,)."""
        token = sequence.sampler.choose(logits, sequence.tokens)
        sequence.tokens.append(token)
        sequence.generated += 1
        self.stats.new_tokens += 1
        reason = self._finish_reason(sequence, token, params)
        sequence.finished = reason is not None
        return NewToken(sequence.index, token, reason)

    def _finish_reason(self, sequence: _Sequence, token: int, params: SamplingParams) -> str | None:
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        full = len(sequence.tokens) >= self.spec.max_positions
        return "length" if full or sequence.generated >= params.max_tokens else None

    def forward(self, live: Sequence[_Sequence], fresh: Sequence[Sequence[int]], *, prefill: bool) -> torch.Tensor:
        """Logits (sequences, vocab_size) after the ``fresh`` tokens of each sequence. Raises NumericError."""
        start = time.perf_counter()
        logits = self._run(Batch(fresh, [sequence.cache for sequence in live]))
        if not torch.isfinite(logits).all():
            raise NumericError("the logits are not numbers: broken weights, too narrow a --dtype or a broken worker")
        end = time.perf_counter()
        elapsed = end - start
        self.stats.traced("pass", "prefill" if prefill else "decode", start, end)
        if prefill:
            self.stats.prefill_s += elapsed
            self.stats.prompt_tokens += sum(len(tokens) for tokens in fresh)
        else:
            self.stats.decode_s += elapsed
            self.stats.decode_tokens += len(live)
        return logits

    def _run(self, batch: Batch[Any]) -> torch.Tensor:
        """One forward pass; the passes of several threads take turns. Raises InputError in a forked process."""
        if os.getpid() != self._process:  # before anything that waits for a thread which the fork has left behind
            raise InputError("a model belongs to the process that opened it: open a new LLM after a fork")
        with self._one_at_a_time, torch.inference_mode():
            return run(self.decoder.forward(batch))

    def new_sequence(self, index: int, prompt: Sequence[int], params: SamplingParams) -> _Sequence:
        """A sequence of which nothing is computed yet."""
        return _Sequence(index, list(prompt), self.decoder.new_cache(), Sampler(params))


class Generation:
    """One batch under way: iterate over its tokens, in the order they come.

    Iterating raises NumericError and any ChannelError; tokens yielded before stand.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        self._engine = engine
        self._params = params
        self._live = [engine.new_sequence(index, prompt, params) for index, prompt in enumerate(prompts)]
        self._stopped: set[int] = set()

    def __iter__(self) -> Iterator[NewToken]:
        fresh = [sequence.tokens[:] for sequence in self._live]
        prefill = True
        while self._live:
            logits = self._engine.forward(self._live, fresh, prefill=prefill)
            for sequence, row in zip(self._live, logits, strict=True):
                yield self._engine.extend(sequence, row, self._params)
            self._live = [s for s in self._live if not s.finished and s.index not in self._stopped]
            fresh = [sequence.tokens[-1:] for sequence in self._live]
            prefill = False

    def stop(self, sequence: int) -> None:
        """End one sequence early, for instance at a stop string."""
        self._stopped.add(sequence)
