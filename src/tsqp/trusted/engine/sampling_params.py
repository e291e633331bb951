"""What a caller says about sampling. Nothing of it ever leaves the trusted side."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tsqp.errors import OptionError

MAX_PENALTY = 100.0  # far beyond use: 1.0 to 1.3 are common


def _says(text: str) -> dict[str, Any]:
    """The help of a field, from which the command line makes a flag."""
    return {"help": text, "heading": "sampling"}


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

    max_tokens: int = field(default=256, metadata=_says("The most new tokens."))
    temperature: float = field(default=0.0, metadata=_says("0 always takes the most likely token."))
    top_k: int = field(default=0, metadata=_says("Choose among the k most likely tokens; 0 for all."))
    top_p: float = field(
        default=1.0, metadata=_says("Choose among the most likely tokens that make up this probability.")
    )
    min_p: float = field(default=0.0, metadata=_says("Leave out tokens less likely than this share of the likeliest."))
    repetition_penalty: float = field(
        default=1.0, metadata=_says("Above 1 makes tokens already in the text less likely.")
    )
    seed: int | None = field(default=None, metadata=_says("Makes sampling repeatable."))
    stop: tuple[str, ...] = field(default=(), metadata=_says("A string that ends the answer; may be given again."))
    stop_token_ids: tuple[int, ...] = field(
        default=(), metadata=_says("The id of a token that ends the answer; may be given again.")
    )
    ignore_eos: bool = field(default=False, metadata=_says("Go on after the model's own end token."))

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require("max_tokens", self.max_tokens, "at least 1", self.max_tokens >= 1)
        _require("temperature", self.temperature, "finite and at least 0", 0 <= self.temperature < math.inf)
        _require("top_k", self.top_k, "at least 0", self.top_k >= 0)
        _require("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1)
        _require("min_p", self.min_p, "at least 0 and below 1", 0 <= self.min_p < 1)
        penalty_fits = 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY
        _require("repetition_penalty", self.repetition_penalty, f"{1 / MAX_PENALTY} to {MAX_PENALTY}", penalty_fits)
        _require("stop", self.stop, "strings that are not empty", all(self.stop))
        ids_fit = all(token >= 0 for token in self.stop_token_ids)
        _require("stop_token_ids", self.stop_token_ids, "ids of tokens, so at least 0", ids_fit)
        seed_fits = self.seed is None or -(2**63) <= self.seed < 2**63
        _require("seed", self.seed, "a 64-bit integer", seed_fits)


def _require(name: str, value: object, what: str, holds: bool) -> None:
    if not holds:
        raise OptionError(f"{name} must be {what}, not {value}", fields=(name,))
