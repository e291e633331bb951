"""Text to tokens and back, and chat templates, without transformers."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as FastTokenizer

from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.tokenizers_library import call, encode, probe
from tsqp.errors import CorruptCheckpoint, OptionError, PromptError
from tsqp.trusted.text.control import ControlTokens
from tsqp.trusted.text.conversation import ChatMessage, Messages, template_values
from tsqp.trusted.text.stop_strings import StopStrings
from tsqp.trusted.text.template import ChatTemplate
from tsqp.trusted.text.token_bytes import ByteStream, TokenBytes, bytes_of
from tsqp.trusted.text.tool_calls import ToolFormat, tool_format
from tsqp.trusted.text.traced import Traced, own_text

if TYPE_CHECKING:
    from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
    from tsqp.trusted.text.grammar import Grammar, Grammars

__all__ = ["ChatMessage", "Rendered", "TextStream", "Tokenizer"]

_PIECE = 1 << 16  # characters of a text that are tokenized at once, where it may be too long
_PER_TOKEN = 4  # characters, about, in ordinary text

_CHARACTERS = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it."""

    text: Traced
    control: ControlTokens

    def encode(self) -> list[int]:
        """Its tokens. Raises PromptError as ``ControlTokens.encode``."""
        return self.control.encode(self.text, special_tokens=False)


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, text_format: TextFormat) -> None:
        self._tokenizer = call(
            lambda: FastTokenizer.from_str(text_format.tokenizer_json),
            lambda told: CorruptCheckpoint(f"the checkpoint's tokenizer cannot be read: {told}"),
        )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        probe(self._tokenizer)
        self.bytes = TokenBytes(self._tokenizer)
        self._template = text_format.chat_template
        self._tool_template = text_format.tool_chat_template or self._template
        self.special_tokens = text_format.special_tokens
        self._special_tokens = {name: own_text(token) for name, token in text_format.special_tokens.items()}
        self._chats: dict[str, tuple[ChatTemplate, ControlTokens]] = {}
        self._without_template = ControlTokens(self._tokenizer)
        self._grammars: dict[int, Grammars] = {}
        self.eos_token_ids = text_format.eos_token_ids

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a raw text, in which a control token that is written out is that control token.

        ``special_tokens`` adds those that the model expects around it, such as BOS. Raises PromptError for text that
        is not Unicode, as bytes that are not UTF-8 become, and for text that the tokenizer cannot encode.
        """
        _refuse_surrogates(text)
        return encode(self._tokenizer, text, special_tokens).ids

    def has_more_tokens(self, text: str, than: int) -> bool:
        """Whether a text has more than so many tokens, as far as that shows without making them all at once.

        A tokenizer takes some hundred bytes for a token, so a text that is far too long would take a hundred times its
        size before it could be refused. Here its pieces are counted one after the other. A cut changes the tokens next
        to it, and whether a control token swallows the white space behind it: pieces with twice as many tokens as are
        allowed are of a text that has too many. False says that the text is short, or may be.
        """
        if len(text) <= max(_PIECE, _PER_TOKEN * than):
            return False
        plain, count = str.__str__(text), 0
        for start in range(0, len(plain), _PIECE):
            count += len(encode(self._tokenizer, plain[start : start + _PIECE], special_tokens=False))
            if count > 2 * than:
                return True
        return False

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens left out; an incomplete character is U+FFFD."""
        return b"".join(self.token_bytes(tokens)).decode(errors="replace")

    def token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """What each token of a text adds to it, in UTF-8: all together are the text. A token may end in a character."""
        return bytes_of(self.bytes, tokens)

    def token_text(self, token: int) -> str:
        """A token as it is shown by itself: special tokens by their names, parts of characters as U+FFFD."""
        return self.bytes.written(token)

    def encode_prompt(self, text: str, /, **template_args: object) -> list[int]:
        """Token ids of a user's text: their turn of the template, or the text as it is where there is no template.

        No character of the text becomes a control token. Raises PromptError as ``encode_chat`` does, and for
        ``template_args`` without a template.
        """
        if self.makes_turns(template_args):
            return self.encode_chat([{"role": "user", "content": text}], **template_args)
        _refuse_surrogates(text)
        return self._without_template.encode(Traced(text), special_tokens=True)

    def makes_turns(self, template_args: Mapping[str, object]) -> bool:
        """Whether ``encode_prompt`` puts a text into a template, or tries to, as the user's turn."""
        return self._template is not None or bool(template_args)

    def encode_chat(self, messages: Messages, /, **template_args: object) -> list[int]:
        """Token ids of a conversation in the model's template, ready for the assistant's answer.

        Only what the template writes itself becomes a control token, nothing that stands in a message or an argument.
        ``template_args`` are variables of the template: ``tools`` and ``documents`` (lists of mappings),
        ``add_generation_prompt`` (True if not given) and whatever else the template knows, such as
        ``enable_thinking``. Raises PromptError when the checkpoint has no template, when the template refuses the
        conversation or fails with it, and for data that is not plain; OptionError for an argument that the template
        does not read.
        """
        return self.render_chat(messages, **template_args).encode()

    def render_chat(self, messages: Messages, /, **template_args: object) -> Rendered:
        """The same before it is tokens. Raises the same."""
        template, control = self._chat(template_args)
        values = template_values(messages, template_args)
        unread = self.unread(template_args)
        if unread:
            raise OptionError(f"the chat template of this checkpoint reads no {', '.join(unread)}")
        text = template.render({"add_generation_prompt": True, **self._special_tokens, **values})
        _refuse_surrogates(text)
        return Rendered(text, control)

    @property
    def chat_template(self) -> str | None:
        """The source of the checkpoint's chat template; None where it has none."""
        return self._template

    def unread(self, template_args: Mapping[str, object]) -> list[str]:
        """The names of those arguments that the template of a conversation with them does not read."""
        template, _ = self._chat(template_args)
        return [name for name in template_args if name not in {*template.variables, "add_generation_prompt"}]

    def _chat(self, template_args: Mapping[str, object]) -> tuple[ChatTemplate, ControlTokens]:
        """The template for a conversation with these arguments. Raises PromptError where there is none."""
        with_tools = template_args.get("tools") is not None
        source = self._tool_template if with_tools else self._template
        if source is None:
            raise PromptError("the checkpoint has no chat template: use tsqp generate --raw")
        if source not in self._chats:
            template = ChatTemplate(source)
            self._chats[source] = template, ControlTokens(self._tokenizer, template.literal_text)
        return self._chats[source]

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls, by its template. Raises OptionError where it has none for tools."""
        source = self._tool_template
        found = None if source is None or "tools" not in ChatTemplate(source).variables else tool_format(source)
        if found is None:
            raise OptionError(
                "tools need a chat template that asks for calls in the format of Hermes or Llama 3; that of this "
                "checkpoint does not",
                fields=("tools",),
            )
        return found

    def grammar(self, params: StructuredOutputsParams, vocab_size: int) -> Grammar:
        """The form of an answer as a grammar over the tokens of a model. The first one takes a fraction of a second.

        Raises OptionError, with the reason in one line, for a form that cannot be read or that no text has, and
        UnsupportedModel where this tokenizer can have no grammars.
        """
        from tsqp.trusted.text.grammar import Grammars

        if vocab_size not in self._grammars:
            own_size = self._tokenizer.get_vocab_size()
            self._grammars[vocab_size] = Grammars(self._tokenizer.to_str(), self.eos_token_ids, vocab_size, own_size)
        return self._grammars[vocab_size].compile(params)


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        pass
    else:
        return
    # Not in the handler: the error of the codec holds the text, and is not chained.
    raise PromptError("the prompt is not UTF-8 text")


class TextStream:
    """Turns tokens into text piece by piece, never cutting a character, and stops at stop strings.

    ``push`` returns only text that later tokens cannot change: an incomplete character, or an end that may become a
    stop string, is held back until it is decided. All pieces together are the text of all tokens, up to a stop string.
    ``after``: the tokens of a text that this one goes on with, see ``docs/text.md`` §6.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, after: Sequence[int] = ()) -> None:
        self._bytes = ByteStream(tokenizer.bytes, after)
        self._characters = _CHARACTERS(errors="replace")
        self._stop = StopStrings(stop)
        self._given: list[str] = []

    @property
    def text(self) -> str:
        """The text so far, with what is held back for a stop string."""
        return "".join(self._given) + self._stop.held

    @property
    def stopped(self) -> bool:
        """Whether a stop string came. Nothing comes after it."""
        return self._stop.found

    def push(self, token: int) -> str:
        """Text that became certain with this token, perhaps none."""
        return self._give(self._stop.push(self._characters.decode(self._bytes.push(token))))

    def finish(self) -> str:
        """The rest of the text, at the end of a generation."""
        rest = self._stop.push(self._characters.decode(b"", final=True))
        return self._give(rest + self._stop.finish())

    def peek(self, token: int) -> bytes:
        """The bytes that a token would add to the text in this place."""
        return self._bytes.peek(token)

    def _give(self, piece: str) -> str:
        self._given.append(piece)
        return piece
