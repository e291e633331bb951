"""Log-probabilities: the tokens that are told are the text that is told, of an answer and of a prompt."""

from __future__ import annotations

import codecs
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.commands import LIMIT_S
from tests.prompt_logprobs import prompt_logprobs
from tests.server.chat_model import IM_END
from tests.server.conftest import Served
from tests.server.serving import NAME, VOCAB, chat_tokenizer, events_of
from tests.trusted.text.vocabularies import VOCABULARIES, cut_at_a_space
from tsqp.api.answer import Answer, Delta
from tsqp.server.logprobs import ShownTokens, TextLogprobs, chat_logprobs, completion_logprobs
from tsqp.trusted.engine.logprobs import TokenLogprobs
from tsqp.trusted.engine.request import Output
from tsqp.trusted.text.tokenizer import TextStream, Tokenizer

TOKENIZER = chat_tokenizer()


def deltas_of(tokenizer: Tokenizer, tokens: list[int], stops: list[str], *, end: bool = False) -> list[Delta]:
    """The pieces of an answer."""
    entries = [TokenLogprobs(token, -1.0, ((token, -1.0), (1, -2.0))) for token in tokens]
    answer = Answer([1], TextStream(tokenizer, stops), entries)
    deltas = []
    for at, token in enumerate(tokens):
        last = at == len(tokens) - 1
        deltas.append(answer.extend(Output(0, token, ("stop" if end else "length") if last else None)))
        if deltas[-1].completion is not None:
            break
    return deltas


@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3)
)
@example(tokens=[0, 94, 0, 1, 15], stops=["0"])  # a byte that is no character, before a stop string
def test_tokens_joined_are_the_text(tokens: list[int], stops: list[str]) -> None:
    """But for what a stop string has left of the last token, which is told as a whole."""
    deltas = deltas_of(TOKENIZER, tokens, stops)
    reader, given_ = TextLogprobs(TOKENIZER), 0
    text, written, shown = "", b"", []
    for delta in deltas:
        more = reader.push(delta)
        text += delta.text
        shown += more
        written += b"".join(one.bytes for one in more)
        given_ += len(delta.text)
        assert all(one.offset <= given_ for one in more)
    assert deltas[-1].completion is not None
    cut = TOKENIZER.decode(tokens[: len(deltas)]) != text
    if cut:
        assert written.decode(errors="replace").startswith(text)
        complete = codecs.getincrementaldecoder("utf-8")("replace")  # leaves a character out that has begun
        assert complete.decode(b"".join(one.bytes for one in shown[:-1])) in text or not text
    else:
        assert written.decode(errors="replace") == text
        assert [one.token for one in shown] == list(deltas[-1].completion.token_ids)
    offsets = [one.offset for one in shown]
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)


def test_a_stop_string_takes_its_tokens_along() -> None:
    tokens = TOKENIZER.encode("Hello, world")
    reader = TextLogprobs(TOKENIZER)
    shown = [one for delta in deltas_of(TOKENIZER, tokens, [", w"]) for one in reader.push(delta)]
    assert "".join(one.text for one in shown) == "Hello"


@pytest.mark.parametrize("with_end", [False, True])
def test_the_end_token_is_told_where_it_is_wanted(with_end: bool) -> None:
    tokens = [*TOKENIZER.encode("Hi"), IM_END]
    reader = TextLogprobs(TOKENIZER, with_end=with_end)
    shown = [one for delta in deltas_of(TOKENIZER, tokens, [], end=True) for one in reader.push(delta)]
    assert [one.text for one in shown] == ["H", "i", "<|im_end|>"][: 2 + with_end]


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
def test_the_first_space_is_told_as_in_the_text(name: str) -> None:
    tokenizer = Tokenizer(VOCABULARIES[name])
    tokens = tokenizer.encode("a bc", special_tokens=False)
    reader = TextLogprobs(tokenizer)
    deltas = deltas_of(tokenizer, tokens, [])
    shown = [one for delta in deltas for one in reader.push(delta)]
    assert "".join(one.text for one in shown) == "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
def test_the_space_with_which_a_text_goes_on_is_told_as_in_the_text(name: str) -> None:
    tokenizer = Tokenizer(VOCABULARIES[name])
    before, tokens = cut_at_a_space(tokenizer)
    entries = [TokenLogprobs(token, -1.0, ((token, -1.0),)) for token in tokens]
    answer = Answer(before, TextStream(tokenizer, after=before), entries)
    deltas = [answer.extend(Output(0, token, None)) for token in tokens]
    reader = TextLogprobs(tokenizer, 2, after=before)
    told = completion_logprobs(one for delta in deltas for one in reader.push(delta))
    assert "".join(told.tokens) == "".join(delta.text for delta in deltas) == " c"
    assert told.text_offset == [2, 3][: len(tokens)]
    assert [[*top] for top in told.top_logprobs if top is not None] == [[one] for one in told.tokens]


def test_a_part_of_a_character_has_a_name_of_its_own() -> None:
    tokens = TOKENIZER.encode("a€")
    reader = TextLogprobs(TOKENIZER)
    shown = [one for delta in deltas_of(TOKENIZER, tokens, []) for one in reader.push(delta)]
    assert completion_logprobs(shown).tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert completion_logprobs(shown).text_offset == [0, 1, 1, 1]
    assert [entry.bytes for entry in chat_logprobs(shown)] == [[97], [0xE2], [0x82], [0xAC]]


@pytest.mark.parametrize(
    ("top", "told"),
    [
        ((), {"a": -3.0}),
        (((67, -0.5), (68, -1.0)), {"d": -0.5, "e": -1.0, "a": -3.0}),
        (((64, -3.0), (68, -4.0)), {"a": -3.0, "e": -4.0}),
        (((67, -3.0),), {"d": -3.0, "a": -3.0}),
    ],
)
def test_the_token_that_was_chosen_is_among_the_likeliest_or_after_them(
    top: tuple[tuple[int, float], ...], told: dict[str, float]
) -> None:
    """In completions. lm-eval takes the first of the likeliest for the one that is chosen without chance."""
    shown = ShownTokens(TOKENIZER).push(64, TokenLogprobs(64, -3.0, top))
    (found,) = completion_logprobs([shown]).top_logprobs
    assert found is not None
    assert list(found.items()) == list(told.items())


def asked(server: Served, **body: Any) -> httpx.Response:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": NAME, **body}, timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_as_likely_as_the_model_says(server: Served, most: int) -> None:
    """What lm-eval asks for: lists of ids, echo, log-probabilities, one token."""
    prompts = [TOKENIZER.encode("The quick brown fox"), [300, 5, 257, 9], [7]]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0, "seed": 1}
    choices = asked(server, **body).json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        told = choice["logprobs"]
        assert {len(told[name]) for name in told} == {len(prompt) + most}
        expected = prompt_logprobs(server.model.llm.logits(prompt), prompt, 1)
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        for value, top, entry in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], expected[1:], strict=False):
            assert entry is not None
            assert value == pytest.approx(entry.logprob, abs=1e-3)
            assert max(top.values()) == pytest.approx(entry.top[0][1], abs=1e-3)
        assert choice["text"].startswith(TOKENIZER.decode(prompt))
    assert choices[0]["logprobs"]["tokens"][:19] == list("The quick brown fox")
    assert choices[0]["logprobs"]["text_offset"][:19] == list(range(19))


def test_an_end_token_counts_where_a_prompt_is_scored(server: Served) -> None:
    body = {"prompt": [7, 8], "echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": {str(IM_END): 100}}
    (choice,) = asked(server, **body).json()["choices"]
    assert choice["logprobs"]["tokens"][2:] == ["<|im_end|>"]
    assert choice["finish_reason"] == "stop"


def test_a_stream_tells_the_same(server: Served) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 2, "max_tokens": 9, "seed": 1}
    (whole,) = asked(server, **body).json()["choices"]
    pieces = [event["choices"][0] for event in events_of(asked(server, **body, stream=True).text)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name in whole["logprobs"]:
        assert [one for piece in pieces for one in piece["logprobs"][name]] == whole["logprobs"][name]
    offsets = whole["logprobs"]["text_offset"]
    assert offsets[:4] == [0, 1, 2, 3]
    assert all(later - earlier >= 0 for earlier, later in pairwise(offsets))
