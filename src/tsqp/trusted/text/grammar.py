"""Answers of a given form: a grammar says, token by token, what may come next. llguidance does the work.

Covers: a form that cannot be read or that no text has is refused before anything is computed; nothing but the form
comes, and an end token only where the form is complete (tests/trusted/text/test_grammar.py).
Does not cover: what a grammar of the caller's own allows, such as white space without end; ``max_tokens`` bounds it.
Assumes: llguidance, whose limits bound the time of a step and the memory of a grammar.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from tsqp.errors import InputError, OptionError, UnsupportedModel
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
from tsqp.trusted.text.printable import printable

T = TypeVar("T")
_LIMITS = LLParserLimits(
    # Of 2,500 optional properties, each of which takes four; the library allows 2,000. It looks through a row for each
    # item that it adds: such a row takes 25 ms, and one of 50,000 would take half a second of every answer's time.
    max_items_in_row=10_000,
    max_lexer_states=50_000,  # 1 to 2 kB each, for each answer; the library allows 250,000
    verbose_errors=False,  # errors are shown, and do not hold the whole schema
)
# The library recurses as deep as a form refers from one rule to the next. A form of the most characters allowed goes
# through less than a sixth of this; pages that are not touched are no memory.
_STACK_BYTES = 256 << 20
_starting = threading.Lock()  # the size of stacks is one for the process

_TOO_COMPLEX = "structured_outputs became too complex within an answer"
_PLACE = re.compile(r"(at )?\d+\(\d+\): (failed to compile JSON schema: )?")  # how an error of the library begins
_WRONG_TOKEN = re.compile("doesn't satisfy the grammar|out of range")  # the library's words; all others: too complex


class Grammars:
    """Makes grammars for one tokenizer: the text of a ``tokenizer.json`` as the tokenizers library writes it.

    ``vocab_size`` is the model's, which may be larger than ``tokenizer_size``. Raises UnsupportedModel for a tokenizer
    of a kind that llguidance does not know, and where no token ends an answer.
    """

    def __init__(self, tokenizer_json: str, eos_token_ids: Sequence[int], vocab_size: int, tokenizer_size: int) -> None:
        ends = [token for token in eos_token_ids if token < vocab_size]
        if not ends:
            raise UnsupportedModel("structured outputs need a checkpoint with an end token")
        self._vocab_size = vocab_size
        try:
            self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=max(vocab_size, tokenizer_size), eos_token=ends)
        except ValueError as error:
            raise UnsupportedModel(
                f"structured outputs do not work with this checkpoint's tokenizer: {printable(str(error), 100)}"
            ) from None

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Raises OptionError, with the reason in one line, for a form that cannot be read or that no text has."""
        source = _source(params)
        matcher = _with_a_large_stack(lambda: self._matcher(source))
        problem = matcher.get_error()
        if not problem and matcher.is_stopped() and not matcher.is_accepting():
            problem = matcher.stop_reason()
        if problem:
            raise _refused(params, _reason(problem))
        return Grammar(matcher, self._vocab_size)

    def _matcher(self, source: str) -> LLMatcher:
        """Raises nothing: the matcher has the error."""
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        matcher.compute_bitmask()  # finds out whether there is any text at all
        return matcher


def check_form(params: StructuredOutputsParams) -> None:
    """Raises OptionError as ``Grammars.compile``, but needs no tokenizer: for before a model is opened.

    Whether any text has the form is not looked at.
    """
    source = _source(params)
    is_bad, found = _with_a_large_stack(lambda: LLMatcher.validate_grammar_with_warnings(source, limits=_LIMITS))
    if is_bad:
        raise _refused(params, _reason(found[0]))


def _with_a_large_stack(make: Callable[[], T]) -> T:
    """Raises InputError where there is no room for the stack."""
    made: list[T] = []
    thread = threading.Thread(target=lambda: made.append(make()))
    with _starting:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        except RuntimeError:
            raise InputError(f"structured_outputs take {_STACK_BYTES >> 20} MiB of address space to read") from None
        finally:
            threading.stack_size(usual)
    thread.join()  # others may read forms meanwhile
    (one,) = made
    return one


class Grammar:
    """A form that was read. Any number of answers may have it, at the same time."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def matcher(self) -> GrammarMatcher:
        """For one answer, from its beginning."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size)


class GrammarMatcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size,): the tokens after which the text is still the beginning of the form; end tokens when it is it.

        Raises InputError when the grammar is too complex to tell, and where only tokens that the model has not may
        come: nothing is allowed then.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error() or not bits.any():
            raise _failed(_TOO_COMPLEX)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if not allowed.any():  # a tokenizer may know more tokens
            raise _failed("structured_outputs needs a token here that the model has not")
        return allowed

    def accept(self, token: int) -> None:
        """Go on with a token. Raises InputError for one that is not allowed, and as ``allowed``."""
        if not self._matcher.consume_token(token):
            is_wrong = _WRONG_TOKEN.search(self._matcher.get_error())
            raise _failed("structured_outputs does not allow this token" if is_wrong else _TOO_COMPLEX)

    def reset(self) -> None:
        """Back to the beginning of the answer."""
        self._matcher.reset()

    @property
    def complete(self) -> bool:
        """Whether the text so far has the form, and may end."""
        return self._matcher.is_accepting()


def _failed(what: str) -> InputError:
    return InputError(what, fields=("structured_outputs",))


def _refused(params: StructuredOutputsParams, reason: str) -> OptionError:
    field = f"structured_outputs.{params.kind}"
    return OptionError(f"{field} cannot be used: {reason}", fields=(field,))


def _source(params: StructuredOutputsParams) -> str:
    """The form as the library reads it. Raises OptionError for a schema that is nested too deeply."""
    # Without this the library looks for all bytes that must come, before it looks for the first token. There may be no
    # end of them: in the grammar `start: /b+/ /b+/` the first part takes every b, and it looked for ever.
    try:
        return LLMatcher.grammar_from_lark(_lark(params) + '\n%llguidance {"no_forcing": true}\n')
    except (ValueError, RecursionError):
        raise _refused(params, "it is nested too deeply") from None


def _lark(params: StructuredOutputsParams) -> str:
    """The form as a Lark grammar. Raises ValueError and RecursionError for a schema that is nested too deeply."""
    if params.regex is not None:
        return f"start: /{regex_to_lark(params.regex, '')}/"
    if params.choice is not None:
        return f"start: {' | '.join(map(json.dumps, params.choice))}"
    if params.grammar is not None:
        return params.grammar
    schema = json.loads(params.json) if isinstance(params.json, str) else {"type": "object"}
    # The library's options in a schema; the caller's own could bring white space without end back.
    schema["x-guidance"] = {"whitespace_flexible": False}
    return f"start: %json {json.dumps(schema)}"


def _reason(problem: str) -> str:
    """The gist of an error, which may show the place in the source over several lines."""
    if problem.startswith("NoExtension"):
        return "no text has this form"
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    gist = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return printable(_PLACE.sub("", gist[-1] if gist else lines[0]), 160)
