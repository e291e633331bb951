"""The completions API: what a client sends, and what it gets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from tsqp.server.logprobs import CompletionLogprobs
from tsqp.server.params import ChoicesBody
from tsqp.server.ranges import documented
from tsqp.server.usage import Usage
from tsqp.tee.receipts import SignedReceipt

MAX_LOGPROBS = 5
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_EITHER = [_TEXT, _IDS, *({"type": "array", "items": one, "minItems": 1} for one in (_TEXT, _IDS))]


class CompletionBody(ChoicesBody, kw_only=True, frozen=True):
    """``prompt``: a text, ids of tokens, or a list of either.

    ``add_special_tokens`` is not OpenAI's: whether texts get those that the model expects around them, such as BOS.
    """

    refused: ClassVar = {"suffix": ("",)}

    prompt: Annotated[Any, documented(anyOf=_EITHER)]
    max_tokens: Annotated[int, documented(minimum=0)] | None = None  # 0 beside echo
    echo: bool | None = None
    logprobs: Annotated[int, documented(minimum=0, maximum=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class Choice(msgspec.Struct, frozen=True):
    """One answer to one prompt, or a piece of it, then without ``finish_reason``."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True):
    """All answers, or an event with a piece of one; ``receipt``: in the last event, where it was asked for."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET
    receipt: SignedReceipt | UnsetType = UNSET
    object: str = "text_completion"
