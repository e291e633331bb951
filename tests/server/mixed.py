"""Requests of every kind for the tiny chat model, all of them streams: the same number, the same request."""

from __future__ import annotations

from typing import Any

from tests.families import random_tokens
from tests.server.chat_model import IM_END
from tests.server.reading import Asked

SHARED = "You are a lighthouse keeper who counts ships. " * 8  # a beginning that conversations have in common
FORM: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "ultramarine"]}, "lit": {"type": "boolean"}},
    "required": ["colour", "lit"],
    "additionalProperties": False,
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def conversation(question: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": question}]


def mixed(number: int, tokens: int) -> Asked:
    """One of eight kinds, with numbers of its own; half of them take all ``tokens``, the others end when they end."""
    seeded = {"temperature": 1.0, "seed": number}
    greedy = {"temperature": 0}
    match number % 8:
        case 0:
            kind = CHAT, {"messages": conversation(f"ship {number}"), "ignore_eos": True, **greedy}
        case 1:
            words = f"which ships came on day {number}? " * (1 + number % 5)
            told = {"logprobs": True, "top_logprobs": 3}
            kind = CHAT, {"messages": conversation(words), "ignore_eos": True, **seeded, **told}
        case 2:
            kind = COMPLETIONS, {"prompt": "x" * (1 + 9 * number), "logprobs": 2, "ignore_eos": True, **greedy}
        case 3:
            text = f"the {number}th ship carries " * 6
            changed = {"top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1}
            kind = COMPLETIONS, {"prompt": text, "stop": ["a", "e", "o", "1"], **seeded, **changed}
        case 4:
            form = {"type": "json_schema", "json_schema": {"name": "light", "schema": FORM}}
            kind = CHAT, {"messages": conversation(f"light {number}"), "response_format": form, **seeded}
        case 5:
            narrowed = {"top_k": 40, "min_p": 0.02, "logit_bias": {str(IM_END): -100, "65": 2}}
            kind = CHAT, {"messages": conversation(f"and {number}?", SHARED), **seeded, **narrowed}
        case 6:
            kind = COMPLETIONS, {"prompt": [*random_tokens(20 * number + 1, number)], "ignore_eos": True, **seeded}
        case _:
            kind = CHAT, {"messages": conversation(f"tell me of {number}", SHARED), **greedy}
    path, body = kind
    wanted = {"include_usage": True}
    return Asked(path, {"model": "chat", **body, "max_tokens": tokens, "stream": True, "stream_options": wanted})
