"""One request: its tokens, its sampler, and what it holds while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from tsqp.errors import NumericError
from tsqp.trusted.engine.logprobs import TokenLogprobs, read_prompt, token_logprobs
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.tap import Tap

FinishReason = Literal["stop", "length", "abort", "error"]
ROWS_WITH_LOGITS = 128  # the most of one request in one pass, where the logits of each row are wanted: they are large
Scope = tuple[str, str]  # a tenant and a salt: whose kept caches a request may find


@dataclass(frozen=True)
class Output:
    """What a step gave to one request: a token, or the error that ended it.

    ``finish_reason``: ``stop`` (the token is an end token, itself not part of the text), ``length`` or ``error``; None
    while the request goes on. ``prompt_logprobs``: with the first token, where they were asked for.
    """

    request: int
    token: int | None
    finish_reason: FinishReason | None
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class Cache(Protocol):
    """What the engine needs of the cache of one sequence: its ``length`` is the number of positions it holds."""

    length: int

    def begin(self, tokens: int) -> None: ...

    def advance(self, rows: int) -> None: ...

    def bytes_for(self, end: int) -> int: ...


@runtime_checkable
class ReusableCache(Cache, Protocol):
    """A cache that another request can go on with, or begin with a copy of."""

    def truncate(self, length: int) -> None: ...

    def copy_from(self, other: Any, length: int) -> None: ...


@dataclass(frozen=True)
class Beginning:
    """What a cache is to begin with: the first ``length`` positions of another one, of the same kind."""

    source: ReusableCache
    length: int


class ChoosesTokens(Protocol):
    """A sampler of one request."""

    def choose(self, logits: Any, text: Sequence[int]) -> int: ...


@dataclass(eq=False, repr=False)  # two with one text are two; no text is to be in a log
class Request:
    """A prompt and its answer so far.

    ``id`` counts up with arrival. ``tokens`` are those of the prompt, ``prompt_length`` of them, and of the answer;
    there are never more than ``end``. ``cache`` is None while the request waits; ``charge`` is the part of the KV
    budget that it holds. ``beginning``: what is still to be copied into its cache. ``pads``: rows that are reserved for
    it and not yet used. ``patient``: nobody follows the answer as it grows. ``tap``: listens while it is computed, and
    then nobody else is. ``adapter``: the name of the one that it has, None for none. ``prompt_logprobs``: of the
    prompt's tokens so far, None for the first, where they are asked for; each is what ``look`` finds.
    """

    id: int
    prompt: InitVar[Sequence[int]]
    params: SamplingParams
    sampler: ChoosesTokens
    _: KW_ONLY
    max_positions: InitVar[int]
    eos_token_ids: Sequence[int] = ()
    look: Callable[[Any, int, int], TokenLogprobs] = token_logprobs
    tenant: str = ""
    scope: Scope | None = None
    patient: bool = False
    deliver: Callable[[Output], None] | None = None
    tap: Tap | None = None
    adapter: str | None = None
    cache: Cache | None = field(default=None, init=False)
    beginning: Beginning | None = field(default=None, init=False)
    charge: int = field(default=0, init=False)
    pads: int = field(default=0, init=False)
    under_way: bool = field(default=False, init=False)  # its rows are in the pass that is being computed
    asked_to_end: FinishReason | None = field(default=None, init=False)  # meanwhile

    def __post_init__(self, prompt: Sequence[int], max_positions: int) -> None:
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.end = min(self.prompt_length + self.params.max_tokens, max_positions)
        asked = self.params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if asked else None

    @property
    def computed(self) -> int:
        """Positions that its cache holds, or will hold once its beginning is there."""
        if self.beginning is not None:
            return self.beginning.length
        return 0 if self.cache is None else self.cache.length

    @property
    def rest(self) -> int:
        """Tokens that are still to cross the layers before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def reads_prompt(self) -> bool:
        """Whether the logits of all its next rows are wanted: they say how likely the prompt is."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length

    @property
    def most_rows(self) -> int:
        """How many rows it may have in the next pass."""
        return min(self.rest, ROWS_WITH_LOGITS) if self.reads_prompt else self.rest

    @property
    def decoding(self) -> bool:
        """Whether its next row is a decode step, and nothing else is left to compute."""
        return self.rest == 1 and len(self.tokens) > self.prompt_length

    def copy_beginning(self) -> None:
        """Copy what its cache begins with, if that is not there. It takes as long as the beginning is large."""
        if self.beginning is not None and isinstance(self.cache, ReusableCache):
            self.cache.copy_from(self.beginning.source, self.beginning.length)
            self.beginning = None

    def take(self, logits: Any, is_finite: bool, first: int | None) -> Output | None:
        """What comes of its logits, float32 (T, vocab_size): its next token, if its last row is there.

        ``first``: the position of the first row, where the prompt is read. What goes wrong is the request's own.
        """
        entries, count = self.prompt_logprobs, self.params.prompt_logprobs
        try:
            if not is_finite:
                raise NumericError(
                    "the logits are not numbers: broken weights, too narrow a compute.dtype or a broken worker",
                    fields=("compute.dtype",),
                )
            if first is not None and entries is not None and count is not None:
                read_prompt(entries, logits, self.tokens, first, count, self.look)
            if self.rest:
                return None
            begins = len(self.tokens) == self.prompt_length
            token = self.sampler.choose(logits[-1], self.tokens)
            reason = self._extend(token)
        except Exception as error:
            return Output(self.id, None, "error", error)
        told = tuple(entries) if begins and entries is not None else None
        return Output(self.id, token, reason, prompt_logprobs=told)

    def give(self, output: Output) -> None:
        """Hand an output to whoever asked, unless they have gone meanwhile."""
        if self.deliver is not None and self.asked_to_end is None:
            self.deliver(output)

    def _extend(self, token: int) -> FinishReason | None:
        """Take one more token of the answer. Returns why the answer ends with it, if it does."""
        self.tokens.append(token)
        if token in self.params.stop_token_ids or (token in self.eos_token_ids and not self.params.ignore_eos):
            return "stop"
        return "length" if len(self.tokens) >= self.end else None
