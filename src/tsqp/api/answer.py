"""Answers to prompts: whole, in pieces, and under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tsqp.errors import TsqpError
from tsqp.trusted.engine.logprobs import TokenLogprobs
from tsqp.trusted.engine.request import Output
from tsqp.trusted.text.tokenizer import TextStream

Ends = Callable[[str], bool]  # told each piece of a text as it comes: whether the answer ends with it


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt. ``finish_reason`` is ``stop`` or ``length``.

    ``logprobs``: one entry for each of ``token_ids``; None unless they were asked for. ``prompt_logprobs``: likewise of
    ``prompt_token_ids``, the first of which has None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True)
class Delta:
    """Text that became certain while generating; the last one carries the whole answer.

    ``logprobs``: of the token that was taken, where they were asked for; the text may be that of other tokens. The end
    token has its own in ``end_logprobs``, as it is not part of the answer. ``prompt_logprobs``: see ``Completion``; the
    first piece has them, too.
    """

    text: str
    completion: Completion | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    end_logprobs: TokenLogprobs | None = None


class Answer:
    """The text and tokens of one answer under way.

    ``logprobs``: the sampler's list, which has an entry for each token that comes; None where there are none.
    ``ends``: None where tokens and stop strings alone say so.
    """

    def __init__(
        self,
        prompt: list[int],
        text: TextStream,
        logprobs: Sequence[TokenLogprobs] | None = None,
        ends: Ends | None = None,
    ) -> None:
        self.prompt = prompt
        self._text = text
        self._ends = ends
        self._tokens: list[int] = []
        self._logprobs = logprobs
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def extend(self, output: Output) -> Delta:
        """Take one more token; the Delta is complete when the answer ends with it. Raises the error of its request."""
        if output.error is not None or output.token is None:
            raise output.error or TsqpError("a request ended without a word")
        token, finish_reason, piece = output.token, output.finish_reason, ""
        logprobs = None if self._logprobs is None else self._logprobs[len(self._tokens)]
        ends = finish_reason == "stop"  # the end token is not part of the answer
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if not ends:
            self._tokens.append(token)
            piece = self._text.push(token)
        if self._text.stopped or (self._ends is not None and self._ends(piece)):
            finish_reason = "stop"
        if finish_reason is None:
            return Delta(piece, None, logprobs, output.prompt_logprobs)
        piece += self._text.finish()
        tokens = tuple(self._tokens)
        every = None if self._logprobs is None else tuple(self._logprobs[: len(tokens)])
        completion = Completion(
            self._text.text, tokens, finish_reason, tuple(self.prompt), every, self._prompt_logprobs
        )
        return Delta(piece, completion, None if ends else logprobs, output.prompt_logprobs, logprobs if ends else None)
