"""The interactive conversation of ``tsqp chat``."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console

from tsqp.api.llm import LLM
from tsqp.errors import InputError, PromptError
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.text.tokenizer import ChatMessage


def converse(
    llm: LLM, params: SamplingParams, system: str | None, template_args: Mapping[str, object], console: Console
) -> None:
    """Read lines, stream answers, until the end of input or /exit. Raises PromptError without a chat template."""
    opening: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    llm.tokenizer.encode_chat(
        [*opening, {"role": "user", "content": "?"}], **template_args
    )  # refuse before the user types
    messages = opening[:]
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                messages = opening[:]
                console.print("the conversation is forgotten", style="dim")
            case text:
                messages = [*messages, {"role": "user", "content": text}]
                messages = _answer(llm, params, messages, template_args, console)


def _answer(
    llm: LLM,
    params: SamplingParams,
    messages: list[ChatMessage],
    template_args: Mapping[str, object],
    console: Console,
) -> list[ChatMessage]:
    """Stream one answer. Returns the conversation with it, or without the last turn when it did not fit."""
    answer = ""
    try:
        for delta in llm.chat(messages, params, **template_args):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            answer += delta.text
    except InputError as error:
        console.print(f"{error} (or /reset)", style="red", markup=False)
        return messages[:-1]
    sys.stdout.write("\n")
    return [*messages, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """One line from the user; None at the end of input. Raises PromptError for bytes that are not text."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise PromptError("the prompt is not UTF-8 text") from None
