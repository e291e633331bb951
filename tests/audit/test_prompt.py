"""The user's tokens are found inside the chat template, whatever they are."""

from __future__ import annotations

import pytest

from tests.families import byte_tokenizer
from tsqp.audit.prompt import MAX_TOKENS, audit_prompt
from tsqp.checkpoint.base import TextFormat
from tsqp.errors import PromptError
from tsqp.trusted.text.tokenizer import Tokenizer

TEMPLATE = "<user>{{ messages[0]['content'] }}</user>"


def tokenizer(template: str | None) -> Tokenizer:
    return Tokenizer(TextFormat(byte_tokenizer().to_str(), (), template))


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("text", ["hello", "0", "x", "0x", "x0", "<user>", "</user>", "> <", "é"])
def test_exactly_the_text(template: str | None, text: str) -> None:
    made = tokenizer(template)
    prompt = audit_prompt(made, text)
    assert made.decode(prompt.user_ids) == text
    assert made.decode(prompt.prefix) == ("<user>" if template else "")


def test_the_longest_prompt() -> None:
    made = tokenizer(TEMPLATE)
    assert len(audit_prompt(made, "y" * MAX_TOKENS).user_ids) == MAX_TOKENS
    with pytest.raises(PromptError, match="201 tokens; an audit takes at most 200"):
        audit_prompt(made, "y" * (MAX_TOKENS + 1))


@pytest.mark.parametrize("text", ["", " \n"])
def test_nothing_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        audit_prompt(tokenizer(TEMPLATE), text)


def test_a_template_that_drops_the_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="leaves nothing"):
        audit_prompt(tokenizer("always the same"), "hello")
