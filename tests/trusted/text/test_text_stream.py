"""Streaming never cuts a character, never takes text back, and stops exactly before a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.families import byte_tokenizer
from tsqp.checkpoint.base import TextFormat
from tsqp.trusted.text.tokenizer import TextStream, Tokenizer

TOKENIZER = Tokenizer(TextFormat(byte_tokenizer().to_str(), ()))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=40)


def pieces(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
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
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out)


@given(TEXT, st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_ends_the_text_before_it(text: str, stop: str) -> None:
    whole = text + "ab" + text
    out, stream = pieces(TOKENIZER.encode(whole), (stop,))
    at = whole.find(stop)
    assert "".join(out) == stream.text == (whole if at < 0 else whole[:at])
    assert stream.stopped == (at >= 0)


def test_the_beginning_of_a_stop_string_is_held_back_until_decided() -> None:
    stream = TextStream(TOKENIZER, ("END",))
    given_out = [stream.push(token) for token in TOKENIZER.encode("xENxEND")]
    assert given_out == ["x", "", "", "ENx", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "xENx"


def test_an_incomplete_character_at_the_end_shows_as_such() -> None:
    tokens = TOKENIZER.encode("é")[:1]
    out, _ = pieces(tokens)
    assert out == ["", "\N{REPLACEMENT CHARACTER}"]
