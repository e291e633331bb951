"""What a caller says about sampling. Nothing of it ever leaves the trusted side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from tsqp.errors import OptionError
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams

MAX_PENALTY = 100.0  # of the repetition penalty, far beyond use: 1.0 to 1.3 are common
MAX_BIAS = 100.0  # as OpenAI's API has it: more than any difference between logits
MAX_LOGPROBS = 20
# Stop strings are looked for after every token: these bounds keep that short. OpenAI's API takes 4 strings.
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
MAX_TOKENS_NAMED = 1024  # in a bias or as ends: each is looked at in Python, for every choice


def _says(text: str) -> dict[str, Any]:
    """The help of a field, from which the command line makes a flag. A field without help has no flag."""
    return {"help": text, "heading": "sampling"}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. The defaults choose greedily.

    ``temperature``, 0 to 2: 0 takes the most likely token; else logits are divided by it. ``top_k`` (0: off), ``top_p``
    and ``min_p`` (0: off) narrow the choice in this order, as transformers does. ``repetition_penalty`` divides the
    positive and multiplies the negative logits of tokens already in the text, the prompt's too (Keskar et al. 2019).
    ``frequency_penalty`` times the number of times that a token is in the answer so far is subtracted from its logit;
    ``presence_penalty`` is subtracted once: both -2 to 2, and neither counts the prompt. ``logit_bias`` adds -100 to
    100 to the logits of tokens, by id. ``seed`` makes sampling repeatable: a token then depends on its logits, the seed
    and its position in the answer, not on what runs beside it. ``logprobs`` asks for the log-probability of each token
    and of so many of the likeliest in its place, 0 to 20, in the model's own distribution: before all of the above.
    ``prompt_logprobs`` asks for the same of each token of the prompt but the first.

    ``stop`` strings (up to 64, of up to 256 characters) end a generation and are not part of its text, nor are
    ``stop_token_ids``; ``ignore_eos`` keeps going at the model's own end tokens. ``structured_outputs`` says what form
    the answer must have; then it can end only when it has that form.

    Raises OptionError for a value of the wrong kind or out of its range.
    """

    max_tokens: int = field(default=256, metadata=_says("The most new tokens."))
    temperature: float = field(default=0.0, metadata=_says("0 always takes the most likely token; at most 2."))
    top_k: int = field(default=0, metadata=_says("Choose among the k most likely tokens; 0 for all."))
    top_p: float = field(
        default=1.0, metadata=_says("Choose among the most likely tokens that make up this probability.")
    )
    min_p: float = field(default=0.0, metadata=_says("Leave out tokens less likely than this share of the likeliest."))
    repetition_penalty: float = field(
        default=1.0, metadata=_says("Above 1 makes tokens already in the text less likely.")
    )
    frequency_penalty: float = field(
        default=0.0, metadata=_says("Above 0 makes a token less likely each time that it is in the answer; -2 to 2.")
    )
    presence_penalty: float = field(
        default=0.0, metadata=_says("Above 0 makes tokens that are in the answer less likely; -2 to 2.")
    )
    seed: int | None = field(default=None, metadata=_says("Makes sampling repeatable."))
    stop: tuple[str, ...] = field(default=(), metadata=_says("A string that ends the answer; may be given again."))
    stop_token_ids: tuple[int, ...] = field(
        default=(), metadata=_says("The id of a token that ends the answer; may be given again.")
    )
    ignore_eos: bool = field(default=False, metadata=_says("Go on after the model's own end token."))
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, "at least 1", 1))
        self._set("temperature", _real("temperature", self.temperature, 0.0, 2.0))
        self._set("top_k", _integer("top_k", self.top_k, "at least 0", 0))
        self._set("top_p", _real("top_p", self.top_p, 0.0, 1.0, without_low=True))
        self._set("min_p", _real("min_p", self.min_p, 0.0, 1.0, without_high=True))
        repetition = _real("repetition_penalty", self.repetition_penalty, 1 / MAX_PENALTY, MAX_PENALTY)
        self._set("repetition_penalty", repetition)
        self._set("frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        self._set("presence_penalty", _real("presence_penalty", self.presence_penalty, -2.0, 2.0))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, "a 64-bit integer", -(2**63), 2**63 - 1))
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("ignore_eos", bool(self.ignore_eos))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None:
                self._set(name, _integer(name, count, f"0 to {MAX_LOGPROBS}", 0, MAX_LOGPROBS))
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise _wrong("structured_outputs", "StructuredOutputsParams", self.structured_outputs)
        if self.ignore_eos:
            raise OptionError(
                "ignore_eos and structured_outputs exclude each other: an answer that has its form ends",
                fields=("ignore_eos", "structured_outputs"),
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises OptionError where ``logit_bias`` or ``stop_token_ids`` name a token that a model does not have."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            largest = max(ids, default=-1)
            if largest >= vocab_size:
                raise _wrong(name, f"ids of tokens, which end at {vocab_size - 1} in this model", largest)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # once, before anybody sees it: of one kind whatever was given


def _integer(name: str, value: object, what: str, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, "an integer", value)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise _wrong(name, what, number)
    return number


def _real(
    name: str, value: object, low: float, high: float, *, without_low: bool = False, without_high: bool = False
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, "a number", value)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    above_low = low < number if without_low else low <= number
    below_high = number < high if without_high else number <= high
    if not (above_low and below_high):  # also what is not a number
        first, last = "above" if without_low else "at least", "below" if without_high else "at most"
        raise _wrong(name, f"{first} {low:g} and {last} {high:g}", number)
    return number


def _stops(stop: object) -> tuple[str, ...]:
    listed = (stop,) if isinstance(stop, str) else _listed("stop", stop, "a string or strings")
    if not all(isinstance(text, str) and text for text in listed):
        raise _wrong("stop", "strings that are not empty")  # not repeated: they are the user's text
    if len(listed) > MAX_STOPS or any(len(text) > MAX_STOP_CHARACTERS for text in listed):
        raise _wrong("stop", f"at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters")
    return listed


def _token_ids(ids: object) -> tuple[int, ...]:
    listed = _listed("stop_token_ids", ids, "ids of tokens")
    _few("stop_token_ids", listed)
    return tuple(_integer("stop_token_ids", token, "ids of tokens, so at least 0", 0) for token in listed)


def _biases(biases: object) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise _wrong("logit_bias", "a mapping from ids of tokens to numbers", biases)
    _few("logit_bias", biases)
    tokens = (_integer("logit_bias", token, "given by ids of tokens, so at least 0", 0) for token in biases)
    numbers = (_real("logit_bias", bias, -MAX_BIAS, MAX_BIAS) for bias in biases.values())
    return dict(zip(tokens, numbers, strict=True))


def _few(name: str, tokens: Sized) -> None:
    if len(tokens) > MAX_TOKENS_NAMED:
        raise _wrong(name, f"of at most {MAX_TOKENS_NAMED} tokens")


def _listed(name: str, values: object, what: str) -> tuple[Any, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise _wrong(name, what, values)
    return tuple(values)


def _wrong(name: str, what: str, *given: object) -> OptionError:
    return OptionError(f"{name} must be {what}{''.join(map(_shown, given))}", fields=(name,))


def _shown(value: object) -> str:
    """A number as it is, if it is short; of anything else the kind alone: it may be the user's text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f", not {type(value).__name__}"
    return f", not {value}" if isinstance(value, float) or abs(value) < 10**30 else ""
