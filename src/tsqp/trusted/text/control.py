"""From a traced text to tokens, where only the template's own characters become control tokens.

Covers: every special token of the vocabulary, and every other added token that the template writes; whole, in parts,
with ``lstrip``, ``rstrip``, ``single_word`` (tests/trusted/text/test_user_text.py).
Assumes: the origin of each character (``traced.py``), and that the tokenizer reports where a token comes from.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from tsqp.checkpoint.tokenizers_library import call, encode, unusable
from tsqp.errors import CorruptCheckpoint, PromptError
from tsqp.trusted.text.traced import Traced, origin

_USER = 0
_NO_OTHER_WAY = "the tokenizer of this checkpoint makes control tokens from ordinary text"


class ControlTokens:
    """The control tokens of a tokenizer under one template."""

    def __init__(self, tokenizer: FastTokenizer, template_text: str = "") -> None:
        """``template_text``: an added token that is not special controls the model if the template writes it.

        So ``<tool_response>`` counts where a template uses it. White space never does: templates write it as text.
        """
        self._tokenizer = tokenizer
        self._control = {
            token_id: token
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.content and (token.special or (token.content in template_text and not token.content.isspace()))
        }
        self._aliased: _AliasedTokenizer | None = None

    def encode(self, text: Traced, *, special_tokens: bool) -> list[int]:
        """Token ids of a text; ``special_tokens`` adds those around it that the model expects, such as BOS.

        Raises PromptError when the tokenizer cannot encode the text, or makes control tokens from the user's part of
        it whatever is done.
        """
        encoding = encode(self._tokenizer, str.__str__(text), special_tokens)
        tokens = encoding.ids
        if all(self._is_allowed(text, *found) for found in _places(encoding, tokens, self._control)):
            return list(tokens)
        del encoding, tokens
        return self._encode_aliased(text, special_tokens)

    def _is_allowed(self, text: Traced, token_id: int, start: int, end: int) -> bool:
        """Whether a token is none that controls the model, or is the template's own."""
        token = self._control.get(token_id)
        if token is None:
            return True
        at = text.find(token.content, start, end)  # the token may have swallowed white space around it
        if at < 0:
            # Not written there: a character that the vocabulary does not know; or letters in another case, or white
            # space that the tokenizer leaves out of a token's place, and then the slow way decides.
            return token_id == self._unknown_id
        return _USER not in origin(text)[at : at + len(token.content)]

    @cached_property
    def _unknown_id(self) -> int | None:
        return _unknown_id(self._tokenizer, json.loads(self._tokenizer.to_str())["model"])

    def _encode_aliased(self, text: Traced, special_tokens: bool) -> list[int]:
        """The slow way, for a text where the fast one found control tokens in the user's words."""
        while self._aliased is None or self._aliased.key in text:
            contents = {token.content: token_id for token_id, token in self._control.items()}
            self._aliased = _AliasedTokenizer(self._tokenizer, contents)
        single = frozenset(token.content for token in self._control.values() if token.single_word)
        return self._aliased.encode(text, special_tokens, single)


class _AliasedTokenizer:
    """The same tokenizer, in which each control token is written as an alias that no text holds.

    The template's own control tokens are rewritten to their aliases, and the whole text is encoded at once. So the
    user's ``<|im_end|>`` is letters like any others, and what depends on a place (a prefix space, white space
    that a token swallows) comes out as it would have done.
    """

    def __init__(self, tokenizer: FastTokenizer, contents: dict[str, int]) -> None:
        self.key = secrets.token_hex(16)  # the user cannot write what nobody knows; `encode` is told if they did
        self._aliases = {content: f"\ue000{self.key}{at:x}\ue001" for at, content in enumerate(contents)}
        self._ids = {self._aliases[content]: token_id for content, token_id in contents.items()}
        self._by_id = {token_id: alias for alias, token_id in self._ids.items()}
        longest_first = sorted(contents, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        data = call(lambda: _renamed(json.loads(tokenizer.to_str()), self._aliases), unusable)
        self._tokenizer = call(lambda: FastTokenizer.from_str(json.dumps(data)), unusable)
        self._unknown_id = _unknown_id(self._tokenizer, data["model"])
        if any(self._tokenizer.token_to_id(alias) != token_id for alias, token_id in self._ids.items()):
            raise CorruptCheckpoint("the checkpoint's tokenizer gives ids to its added tokens that are not theirs")

    def encode(self, text: Traced, special_tokens: bool, single_words: frozenset[str]) -> list[int]:
        plain, count = self._rewritten(text, single_words)
        encoding = encode(self._tokenizer, plain, special_tokens)
        tokens, found = encoding.ids, 0
        for token_id, start, end in _places(encoding, tokens, self._by_id):
            if self._by_id[token_id] in plain[start:end]:
                found += 1
            elif token_id != self._unknown_id:
                raise PromptError(_NO_OTHER_WAY)
        if found != count:
            raise PromptError(_NO_OTHER_WAY)
        return list(tokens)

    def _rewritten(self, text: Traced, single_words: frozenset[str]) -> tuple[str, int]:
        """The text with the aliases of the template's own control tokens, and how many there are."""
        plain, out, end, count = str.__str__(text), [], 0, 0
        for run in re.finditer(b"\x01+", origin(text)):  # nothing is matched across its ends
            for match in self._pattern.finditer(plain, *run.span()):
                if match[0] in single_words and _touches_a_word(plain, *match.span()):
                    continue
                out += [plain[end : match.start()], self._aliases[match[0]]]
                end = match.end()
                count += 1
        return "".join([*out, plain[end:]]), count


def _places(encoding: Encoding, tokens: Sequence[int], wanted: Container[int]) -> Iterator[tuple[int, int, int]]:
    """Those of the tokens of a text that are ``wanted``, and from where to where they stand in it.

    Without BOS and the like, which the tokenizer adds. Places are asked for one by one: a list of all of them takes
    several times as much memory as the tokens. One that has no place is in none, which is refused.
    """
    for index, (token_id, added) in enumerate(zip(tokens, encoding.special_tokens_mask, strict=True)):
        if token_id in wanted and not added:
            yield token_id, *(encoding.token_to_chars(index) or (0, 0))


def _touches_a_word(text: str, start: int, end: int) -> bool:
    return bool(re.match(r"\w", text[end : end + 1]) or re.match(r"\w", text[start - 1 : start] if start else ""))


def _unknown_id(tokenizer: FastTokenizer, model: dict[str, Any]) -> int | None:
    """The id that stands for characters that the vocabulary does not know; None without one."""
    if isinstance(model.get("unk_id"), int):  # a Unigram model
        return int(model["unk_id"])
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _renamed(data: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """A parsed ``tokenizer.json`` with other names for some tokens, which keep their ids. Changes it in place."""
    for token in data["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = data["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:  # a Unigram model's pieces and scores, in order
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    if isinstance(model.get("merges"), list):  # one that makes a control token from letters is left out
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, aliases)]
    return data


def _makes(merge: Any, names: dict[str, str]) -> bool:
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return left in names or right in names or left + right in names
