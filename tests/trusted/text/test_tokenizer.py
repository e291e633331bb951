"""Chat templates are strangers' code and prompts are any bytes: each ends in tokens or in one clear error."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.families import byte_tokenizer
from tests.trusted.text.vocabularies import VOCABULARIES
from tsqp.checkpoint.base import TextFormat
from tsqp.errors import PromptError
from tsqp.trusted.text.tokenizer import ChatMessage, Tokenizer

SECRET = "my secret"
MESSAGES = [ChatMessage(role="user", content=SECRET)]


def tokenizer(template: str | None) -> Tokenizer:
    return Tokenizer(TextFormat(byte_tokenizer().to_str(), (), template))


def refused(template: str) -> str:
    with pytest.raises(PromptError) as caught:
        tokenizer(template).encode_chat(MESSAGES)
    text = str(caught.value)
    assert SECRET not in text
    assert "\n" not in text
    return text


ALIKE = st.sampled_from(["a", "word ", "é", "\n", "    ", "</s>", "12", "ab😀"])


@pytest.mark.parametrize("text_format", VOCABULARIES.values(), ids=VOCABULARIES)
@given(st.lists(ALIKE, min_size=1, max_size=6).map("".join), st.sampled_from([60_000, 140_000]))
@settings(max_examples=3, deadline=None)
def test_a_text_that_is_far_too_long_is_known_without_its_tokens(text_format: TextFormat, unit: str, size: int) -> None:
    tokenizer = Tokenizer(text_format)
    # Where nothing stands for single bytes, all unknown characters in a row are one token, however many there are.
    assume(len(tokenizer.encode(unit * 64)) > len(tokenizer.encode(unit * 8)))
    text = unit * (size // len(unit))
    count = len(tokenizer.encode(text))
    assert not tokenizer.has_more_tokens(text, count)
    if len(text) > 1 << 16:
        assert tokenizer.has_more_tokens(text, min(count // 3, len(text) // 5))


def test_a_template_makes_the_text() -> None:
    chat = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    assert chat.encode_chat(MESSAGES) == byte_tokenizer().encode(f"user: {SECRET}").ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{{ 'a' + 1 }}",
        "{{ strftime_now(5) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages[0].content | int | nonsense }}",
        "{{ messages[7].content.x }}",
        "{{ {}[messages[0].content] + 1 }}",
        "{% for %}",
        "{{ messages[0].__class__.__mro__ }}{{ 1 // 0 }}",
        "{% include messages[0].content %}",
        "{{ messages.append(1) }}",
        "{{ messages | tojson(indent=strftime_now) }}",
    ],
)
def test_whatever_a_template_raises_is_one_error(template: str) -> None:
    assert "chat template" in refused(template)


def test_a_refusal_says_why_in_the_words_of_the_template_only() -> None:
    assert "system messages are not supported" in refused("{{ raise_exception('system messages are not supported') }}")
    assert "refuses this conversation" in refused("{{ raise_exception('no ' + messages[0].content) }}")
    assert "refuses this conversation" in refused("{{ raise_exception(messages) }}")


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b"])
def test_text_that_is_not_unicode(text: str) -> None:
    for chat in (tokenizer(None), tokenizer("{{ messages[0].content }}")):
        with pytest.raises(PromptError, match="UTF-8"):
            chat.encode(text)
    with pytest.raises(PromptError, match="UTF-8"):
        chat.encode_chat([ChatMessage(role="user", content=text)])
