"""Generation: prompts in, tokens out. Drives the decoder with batches of sequences and keeps their caches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tsqp.errors import NumericError, PromptError
from tsqp.spec.model import ModelSpec
from tsqp.trusted.batch import Batch
from tsqp.trusted.cache import KVCache
from tsqp.trusted.decoder import Decoder
from tsqp.trusted.pending import run
from tsqp.trusted.sampling import Sampler
from tsqp.trusted.sampling_params import SamplingParams
from tsqp.trusted.stats import Stats


@dataclass(frozen=True)
class NewToken:
    """A token that was generated: the index of its prompt, and why the sequence ended with it, if it did."""

    sequence: int
    token: int
    finish_reason: str | None  # "stop": an end token (itself not part of the text); "length"; None: goes on


@dataclass
class _Sequence:
    index: int
    tokens: list[int]
    cache: KVCache
    sampler: Sampler
    generated: int = 0
    finished: bool = False


@dataclass
class Engine:
    """Runs prompts through a decoder. ``eos_token_ids`` end a sequence unless it ignores them."""

    decoder: Decoder
    eos_token_ids: tuple[int, ...]
    stats: Stats
    _stopped: set[int] = field(default_factory=set)

    @property
    def spec(self) -> ModelSpec:
        return self.decoder.spec

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
        with torch.inference_mode():
            return run(self.decoder.forward(Batch([prompt], [self._cache()], every_row=True)))

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[NewToken]:
        """Generate for all prompts together, token by token, in the order they come.

        Raises PromptError before anything is sent, NumericError and any ChannelError on the way; tokens yielded
        before stand.
        """
        for prompt in prompts:
            self.check_prompt(prompt)
        self._stopped.clear()
        live = [_Sequence(index, list(prompt), self._cache(), Sampler(params)) for index, prompt in enumerate(prompts)]
        fresh: list[list[int]] = [sequence.tokens[:] for sequence in live]
        prefill = True
        while live:
            logits = self._forward(live, fresh, prefill=prefill)
            for sequence, row in zip(live, logits, strict=True):
                yield self._extend(sequence, row, params)
            live = [s for s in live if not s.finished and s.index not in self._stopped]
            fresh = [sequence.tokens[-1:] for sequence in live]
            prefill = False

    def stop(self, sequence: int) -> None:
        """End one sequence of the running ``generate`` early, for instance at a stop string."""
        self._stopped.add(sequence)

    def _extend(self, sequence: _Sequence, logits: torch.Tensor, params: SamplingParams) -> NewToken:
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

    def _forward(self, live: Sequence[_Sequence], fresh: Sequence[Sequence[int]], *, prefill: bool) -> torch.Tensor:
        start = time.perf_counter()
        with torch.inference_mode():
            logits = run(self.decoder.forward(Batch(fresh, [sequence.cache for sequence in live])))
        if not torch.isfinite(logits).all():
            raise NumericError("the logits are not numbers: broken weights, too narrow a --dtype or a broken worker")
        elapsed = time.perf_counter() - start
        if prefill:
            self.stats.prefill_s += elapsed
            self.stats.prompt_tokens += sum(len(tokens) for tokens in fresh)
        else:
            self.stats.decode_s += elapsed
            self.stats.decode_tokens += len(live)
        return logits

    def _cache(self) -> KVCache:
        return KVCache(self.spec, self.decoder.dtype)
