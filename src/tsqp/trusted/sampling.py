"""From logits to the next token. The sampler, its seed and its choices never leave the trusted side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tsqp.errors import OptionError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. The defaults choose greedily.

    ``temperature`` 0 takes the most likely token; else logits are divided by it. ``top_k`` (0: off), ``top_p`` and
    ``min_p`` (0: off) narrow the choice in this order, as transformers does. ``repetition_penalty`` divides the
    positive and multiplies the negative logits of tokens already in the text (Keskar et al. 2019). ``seed`` makes
    sampling repeatable. ``stop`` strings end a generation and are not part of its text, nor are ``stop_token_ids``;
    ``ignore_eos`` keeps going at the model's own end tokens.

    Raises OptionError for a value out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require("max_tokens", self.max_tokens, "at least 1", self.max_tokens >= 1)
        _require("temperature", self.temperature, "finite and at least 0", 0 <= self.temperature < math.inf)
        _require("top_k", self.top_k, "at least 0", self.top_k >= 0)
        _require("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1)
        _require("min_p", self.min_p, "at least 0 and below 1", 0 <= self.min_p < 1)
        _require(
            "repetition_penalty", self.repetition_penalty, "finite and above 0", 0 < self.repetition_penalty < math.inf
        )
        _require("stop", self.stop, "strings that are not empty", all(self.stop))
        seed_fits = self.seed is None or -(2**63) <= self.seed < 2**63
        _require("seed", self.seed, "a 64-bit integer", seed_fits)


def _require(name: str, value: object, what: str, holds: bool) -> None:
    if not holds:
        raise OptionError(f"{name} must be {what}, not {value}")


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> int:
        """The next token from logits (vocab_size,), float32; ``text`` holds every token so far."""
        params = self._params
        if params.repetition_penalty != 1.0:
            logits = penalised(logits, text, params.repetition_penalty)
        if params.temperature == 0.0:
            return int(logits.argmax())
        probabilities = torch.softmax(narrowed(logits / params.temperature, params), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def penalised(logits: torch.Tensor, text: Sequence[int], penalty: float) -> torch.Tensor:
    """Logits with those of the tokens in ``text`` made less likely."""
    seen = torch.tensor(sorted(set(text)), dtype=torch.int64)
    scores = logits[seen]
    penalised_logits = logits.clone()
    penalised_logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return penalised_logits


def narrowed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits with all but the choices that top-k, top-p and min-p allow at minus infinity."""
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        # A token stays while the mass before it is below top_p, so the first one always stays.
        outside = probabilities.cumsum(-1) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -math.inf)
    if params.min_p > 0.0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return logits
