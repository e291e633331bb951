"""The completions API: what a client sends, and what it gets."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from tsqp.server.logprobs import CompletionLogprobs
from tsqp.server.params import ChoicesBody
from tsqp.server.usage import Usage


class CompletionBody(ChoicesBody, kw_only=True, frozen=True):
    """``prompt``: a text, ids of tokens, or a list of either.

    ``add_special_tokens`` is not OpenAI's: whether texts get those that the model expects around them, such as BOS.
    """

    refused: ClassVar = {"suffix": ("",)}

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class Choice(msgspec.Struct, frozen=True):
    """One answer to one prompt, or a piece of it, then without ``finish_reason``."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True):
    """All answers, or an event with a piece of one."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
