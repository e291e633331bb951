"""A decoder without a model: its logits are a function of all tokens so far, and it watches what is asked of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from tsqp.checkpoint import open_checkpoint
from tsqp.config.model import ModelConfig
from tsqp.model.batch import Batch
from tsqp.model.cache import Positions
from tsqp.model.pending import Steps
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.logprobs import TokenLogprobs, token_logprobs
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.stats import Stats

VOCABULARY = 40
CONTEXT = 64
GROW = 4  # positions
SIZE = 10  # bytes of a position
TINY = replace(open_checkpoint("synthetic:tiny").config, vocab_size=VOCABULARY, max_positions=CONTEXT)


class FakeCache(Positions):
    """The tokens and kinds of its positions: ``steps`` says of each whether it was computed as a decode step."""

    alive = 0  # of all that were ever made, those that somebody still holds

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.steps: list[bool] = []
        self.capacity = 0
        FakeCache.alive += 1

    def __del__(self) -> None:
        FakeCache.alive -= 1

    def write(self, tokens: Sequence[int], first_step: int) -> None:
        self.tokens[self.length :] = tokens
        self.steps[self.length :] = [self.length + row >= first_step for row in range(len(tokens))]
        self.capacity = max(self.capacity, -(-len(self.tokens) // GROW) * GROW)

    def bytes_for(self, end: int) -> int:
        return SIZE * max(self.capacity, -(-end // GROW) * GROW)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def copy_from(self, other: FakeCache, length: int) -> None:
        assert length <= len(other.tokens)
        self.length = 0
        self.write(other.tokens[:length], CONTEXT)
        self.steps = other.steps[:length]
        self.length = length


@dataclass
class FakeDecoder:
    """See PassDecoder. ``fail``: raise this in the next pass, once everything was written."""

    config: ModelConfig = TINY
    fail: BaseException | None = None
    passes: list[list[int]] = field(default_factory=list)  # the rows of each sequence, of each pass
    broken: set[int] = field(default_factory=set)  # a sequence with such a token has logits that are not numbers

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]:
        assert batch.first_steps is not None
        assert batch.sampled is not None
        assert batch.whole is not None
        wanted = []
        for tokens, cache, first, sampled, whole in zip(
            batch.tokens, batch.caches, batch.first_steps, batch.sampled, batch.whole, strict=True
        ):
            assert tokens
            cache.write(tokens, first)
            if whole:
                wanted += [cache.tokens[: cache.length + row + 1] for row in range(len(tokens))]
            elif sampled:
                wanted.append(list(cache.tokens))
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        self.passes.append([len(tokens) for tokens in batch.tokens])
        batch.advance()
        rows = [
            torch.full((VOCABULARY,), float("nan")) if self.broken & set(one) else logits_after(one) for one in wanted
        ]
        return torch.stack(rows) if rows else torch.empty(0, VOCABULARY)
        yield cast(Any, None)  # a generator that hands out no products


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """Logits (VOCABULARY,), another for each text."""
    generator = torch.Generator().manual_seed(random.Random(repr(list(tokens))).getrandbits(60))
    return torch.randn(VOCABULARY, generator=generator) * 3


def fake_engine(decoder: FakeDecoder | None = None, **options: Any) -> Engine:
    """An engine that tells rows of prompts and of answers apart, over a fake decoder."""
    return Engine(decoder or FakeDecoder(), (), Stats(), same_bits=True, **options)


def logprobs_of(prompt: Sequence[int], count: int) -> tuple[TokenLogprobs | None, ...]:
    """Those of a prompt, each token by itself."""
    rows = (logits_after(prompt[:at]) for at in range(1, len(prompt)))
    return (None, *(token_logprobs(row, token, count) for row, token in zip(rows, prompt[1:], strict=True)))


def alone(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """The answer to one prompt by an engine that has nothing else to do."""
    return [output.token for _, output in fake_engine().generate([prompt], params) if output.token is not None]
