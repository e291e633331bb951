"""Answers to prompts: whole, in pieces, and under way."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.errors import TsqpError
from tsqp.trusted.engine.request import Output
from tsqp.trusted.text.tokenizer import TextStream


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt. ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """Text that became certain while generating; the last one carries the whole answer."""

    text: str
    completion: Completion | None = None


class Answer:
    """The text and tokens of one answer under way."""

    def __init__(self, prompt: list[int], text: TextStream) -> None:
        self.prompt = prompt
        self._text = text
        self._tokens: list[int] = []

    def extend(self, output: Output) -> Delta:
        """Take one more token; the Delta is complete when the answer ends with it. Raises the error of its request."""
        if output.error is not None or output.token is None:
            raise output.error or TsqpError("a request ended without a word")
        token, finish_reason, piece = output.token, output.finish_reason, ""
        if finish_reason != "stop":  # the end token is not part of the answer
            self._tokens.append(token)
            piece = self._text.push(token)
        if self._text.stopped:
            finish_reason = "stop"
        if finish_reason is None:
            return Delta(piece)
        piece += self._text.finish()
        completion = Completion(self._text.text, tuple(self._tokens), finish_reason, tuple(self.prompt))
        return Delta(piece, completion)
