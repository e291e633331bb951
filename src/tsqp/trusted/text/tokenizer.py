"""Text to tokens and back, and chat templates, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from tsqp.checkpoint.base import TextFormat
from tsqp.errors import CorruptCheckpoint, PromptError


class ChatMessage(TypedDict):
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, text_format: TextFormat) -> None:
        try:
            self._tokenizer = FastTokenizer.from_str(text_format.tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise CorruptCheckpoint(f"the checkpoint's tokenizer cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._template = text_format.chat_template
        self._special_tokens = text_format.special_tokens
        self.eos_token_ids = text_format.eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ``special_tokens`` adds those that the model expects around it, such as BOS.

        Raises PromptError for text that is not Unicode, as bytes that are not UTF-8 become.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("the prompt is not UTF-8 text") from None
        return self._tokenizer.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens left out; an incomplete character is U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation in the model's template, ready for the assistant's answer.

        Raises PromptError when the checkpoint has no template or the template refuses the conversation.
        """
        if self._template is None:
            raise PromptError("the checkpoint has no chat template: use tsqp generate --raw")
        # The template comes with the checkpoint: it is data of a stranger, so it runs in a sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        environment.filters["tojson"] = _to_json
        try:
            text = environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except _Refusal as refusal:
            # Only what stands in the template itself: a reason that it has put together may hold the prompt.
            reason = f": {refusal}" if str(refusal) in self._template else ""
            raise PromptError(f"the chat template refuses this conversation{reason}") from None
        except Exception:  # a stranger's code can raise anything; its text may hold the prompt
            raise PromptError("the checkpoint's chat template fails with this conversation: try --raw") from None
        return self.encode(text, special_tokens=False)


class _Refusal(TemplateError):
    """The template called ``raise_exception``."""


def _refuse(reason: object) -> None:
    raise _Refusal(str(reason))


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)


class TextStream:
    """Turns tokens into text piece by piece, never cutting a character, and stops at stop strings.

    ``push`` returns only text that later tokens cannot change: an incomplete character, or an end that may become a
    stop string, is held back until it is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one are decided text
        self._read = 0  # tokens before this one are in `text`
        self._given = 0  # characters handed out
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that became certain with this token, perhaps none."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._context : self._read])
        now = self._tokenizer.decode(self._tokens[self._context :])
        if not now.endswith("\N{REPLACEMENT CHARACTER}") and len(now) > len(before):
            self._context, self._read = self._read, len(self._tokens)
            self._append(now[len(before) :])
        return self._release(held_back=True)

    def finish(self) -> str:
        """The rest of the text, at the end of a generation."""
        if not self.stopped:
            before = self._tokenizer.decode(self._tokens[self._context : self._read])
            now = self._tokenizer.decode(self._tokens[self._context :])
            self._read = len(self._tokens)
            self._append(now[len(before) :])
        return self._release(held_back=False)

    def _append(self, piece: str) -> None:
        self.text += piece
        ends = [at for stop in self._stop if (at := self.text.find(stop)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self.stopped = True

    def _release(self, *, held_back: bool) -> str:
        end = len(self.text)
        if held_back and not self.stopped:
            end -= max((self._overlap(stop) for stop in self._stop), default=0)
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _overlap(self, stop: str) -> int:
        """How many last characters of the text may be the beginning of ``stop``."""
        sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return next((size for size in sizes if self.text.endswith(stop[:size])), 0)
