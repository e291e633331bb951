"""Streaming never cuts a character, never takes text back, and stops exactly before a stop string."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from tests.families import byte_tokenizer
from tests.trusted.text.vocabularies import VOCABULARIES, cut_at_a_space
from tsqp.checkpoint.base import TextFormat
from tsqp.errors import UnsupportedModel
from tsqp.trusted.text.stop_strings import StopStrings
from tsqp.trusted.text.tokenizer import TextStream, Tokenizer

TOKENIZER = Tokenizer(TextFormat(byte_tokenizer().to_str(), ()))
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNKNOWN), max_size=40)
NAMES = st.sampled_from(sorted(VOCABULARIES))
TOKENS = st.lists(st.integers(0, 420), max_size=30)
STOPS = st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4)


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(VOCABULARIES[name])


@cache
def library(name: str) -> FastTokenizer:
    return FastTokenizer.from_str(VOCABULARIES[name].tokenizer_json)


def pieces(tokens: list[int], stop: tuple[str, ...] = (), by: Tokenizer = TOKENIZER) -> tuple[list[str], TextStream]:
    stream = TextStream(by, stop)
    out = []
    for token in tokens:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


@given(TEXT)
def test_the_pieces_make_the_text(text: str) -> None:
    out, stream = pieces(TOKENIZER.encode(text))
    assert "".join(out) == stream.text == text
    assert not any(UNKNOWN in piece for piece in out)


@given(NAMES, TOKENS)
def test_the_pieces_of_any_tokens_make_their_text(name: str, tokens: list[int]) -> None:
    """Also of tokens that no text has: parts of characters, control tokens, ids without a token."""
    out, stream = pieces(tokens, by=tokenizer(name))
    assert "".join(out) == stream.text == tokenizer(name).decode(tokens)


@given(NAMES, TOKENS)
def test_the_text_is_the_librarys(name: str, tokens: list[int]) -> None:
    """But for bytes that are no UTF-8 in a vocabulary of byte tokens: the library shows each byte of a run as one."""
    expected = library(name).decode(tokens)
    found = tokenizer(name).decode(tokens)
    if name == "GGUF, SentencePiece":
        assume(UNKNOWN not in found)
    assert found == expected


@given(NAMES, TEXT)
def test_a_text_comes_back_from_its_tokens_as_from_the_library(name: str, text: str) -> None:
    tokens = tokenizer(name).encode(text)
    assert tokenizer(name).decode(tokens) == library(name).decode(tokens)


@given(NAMES, TEXT, st.integers(0, 40))
def test_a_text_that_is_cut_anywhere_is_the_same_in_pieces_and_at_once(name: str, text: str, cut: int) -> None:
    tokens = tokenizer(name).encode(text, special_tokens=False)[:cut]
    out, _ = pieces(tokens, by=tokenizer(name))
    assert "".join(out) == tokenizer(name).decode(tokens)
    assert UNKNOWN not in "".join(out[:-1])  # what is not complete comes last, if at all


@given(NAMES, TOKENS)
def test_the_bytes_of_tokens_are_the_text(name: str, tokens: list[int]) -> None:
    found = tokenizer(name).token_bytes(tokens)
    assert len(found) == len(tokens)
    assert b"".join(found).decode(errors="replace") == tokenizer(name).decode(tokens)
    stream = TextStream(tokenizer(name))
    for token, added in zip(tokens, found, strict=True):
        assert stream.peek(token) == stream.peek(token) == added
        stream.push(token)


@given(NAMES, TOKENS, TOKENS)
def test_a_text_that_goes_on_is_what_its_tokens_add_to_the_text_before(
    name: str, before: list[int], tokens: list[int]
) -> None:
    """Whatever the tokens before are: a first space is left out where they are no text yet."""
    both = tokenizer(name).token_bytes([*before, *tokens])
    stream = TextStream(tokenizer(name), after=before)
    for token, added in zip(tokens, both[len(before) :], strict=True):
        assert stream.peek(token) == added
        stream.push(token)
    stream.finish()
    assert stream.text == b"".join(both[len(before) :]).decode(errors="replace")


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
def test_a_stop_string_may_be_the_space_with_which_a_text_goes_on(name: str) -> None:
    before, tokens = cut_at_a_space(tokenizer(name))
    stream = TextStream(tokenizer(name), (" ",), after=before)
    assert [stream.push(token) for token in tokens] == [""] * len(tokens)
    assert (stream.text, stream.stopped) == ("", True)


def test_the_first_space_is_left_out_once() -> None:
    """As SentencePiece has it; a space alone may be a token."""
    sentencepiece = tokenizer("GGUF, SentencePiece")
    space, a = (sentencepiece._tokenizer.token_to_id(piece) for piece in ("▁", "▁a"))
    assert space is not None
    assert a is not None
    assert sentencepiece.token_bytes([a, a]) == [b"a", b" a"]
    assert sentencepiece.token_bytes([1, space, space, a]) == [b"", b"", b" ", b" a"]
    assert [sentencepiece.token_text(token) for token in (1, a)] == ["<s>", " a"]


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
def test_control_tokens_before_a_text_do_not_count_as_its_first(name: str) -> None:
    control = [token for token, added in library(name).get_added_tokens_decoder().items() if added.special]
    tokens = [control[0], 10**6, *library(name).encode("  a b").ids, control[0], *library(name).encode(" a").ids]
    assert tokenizer(name).decode(tokens) == library(name).decode(tokens)


@given(TEXT, st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_ends_the_text_before_it(text: str, stop: str) -> None:
    whole = text + "ab" + text
    out, stream = pieces(TOKENIZER.encode(whole), (stop,))
    at = whole.find(stop)
    assert "".join(out) == stream.text == (whole if at < 0 else whole[:at])
    assert stream.stopped == (at >= 0)


def first_complete(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, the longest of those, looked for at every character."""
    for end in range(1, len(text) + 1):
        places = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if places:
            return text[: min(places)]
    return text


@given(st.lists(st.text("abé", max_size=5), max_size=8), STOPS)
def test_stop_strings_end_a_text_at_the_same_place_however_it_comes(parts: list[str], stops: list[str]) -> None:
    search, shown = StopStrings(stops), ""
    for part in parts:
        shown += search.push(part)
        whole = "".join(parts)
        assert first_complete(whole, stops).startswith(shown), "no part of a stop string is shown"
    found = search.found
    shown += search.finish()
    assert shown == first_complete("".join(parts), stops)
    assert found == (shown != "".join(parts))


@given(NAMES, st.text("abé <", max_size=20), STOPS)
def test_stop_strings_over_the_borders_of_tokens(name: str, text: str, stops: list[str]) -> None:
    by = tokenizer(name)
    tokens = by.encode(text, special_tokens=False)
    out, stream = pieces(tokens, tuple(stops), by)
    assert "".join(out) == stream.text == first_complete(by.decode(tokens), stops)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: str) -> None:
    search = StopStrings([stop])
    search.push(text)
    assert search.found or search.held == max(
        (text[at:] for at in range(len(text) + 1) if stop.startswith(text[at:])), key=len
    )


def test_the_beginning_of_a_stop_string_is_held_back_until_decided() -> None:
    stream = TextStream(TOKENIZER, ("END",))
    given_out = [stream.push(token) for token in TOKENIZER.encode("xENxEND")]
    assert given_out == ["x", "", "", "ENx", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "xENx"
    assert stream.push(TOKENIZER.encode("x")[0]) == ""


def test_the_text_under_way_has_what_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ("END",))
    assert [stream.push(token) for token in TOKENIZER.encode("xEN")] == ["x", "", ""]
    assert stream.text == "xEN"
    assert stream.finish() == "EN"


def test_an_incomplete_character_at_the_end_shows_as_such() -> None:
    tokens = TOKENIZER.encode("é")[:1]
    out, _ = pieces(tokens)
    assert out == ["", UNKNOWN]


def test_a_stop_string_may_be_what_an_incomplete_character_becomes() -> None:
    out, stream = pieces(TOKENIZER.encode("aé")[:2], (UNKNOWN,))
    assert (out, stream.text, stream.stopped) == (["a", "", ""], "a", True)


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), decoders.Strip(" ", 1, 0), None], ids=str)
def test_another_kind_of_decoder_is_refused_by_name(decoder: decoders.Decoder | None) -> None:
    made = FastTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        made.decoder = decoder
    name = "none" if decoder is None else json.loads(decoder.__getstate__())["type"]
    with pytest.raises(UnsupportedModel, match=f"the tokenizer's decoder {name} is not implemented"):
        Tokenizer(TextFormat(made.to_str(), ()))
