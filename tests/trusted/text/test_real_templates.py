"""Chat templates of real models make the text that they make in transformers, and their control tokens are found.

The templates are other people's and are not kept here. ``TSQP_CHAT_TEMPLATES`` names a directory of ``.jinja`` files,
such as ``vendor/llama.cpp/models/templates`` in the source package of llama_cpp_python.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.families import byte_tokenizer
from tsqp.errors import PromptError
from tsqp.trusted.text.control import ControlTokens
from tsqp.trusted.text.conversation import template_values
from tsqp.trusted.text.template import ChatTemplate
from tsqp.trusted.text.traced import Traced, own_text

DIRECTORY = os.environ.get("TSQP_CHAT_TEMPLATES")
PATHS = sorted(Path(DIRECTORY).glob("*.jinja")) if DIRECTORY else []
pytestmark = pytest.mark.skipif(not PATHS, reason="TSQP_CHAT_TEMPLATES names no directory of .jinja files")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# What control tokens look like; no text of the conversations does.
CONTROL = re.compile(r"<[|｜][^\s<>{}']{1,60}[|｜]>|\[/?[A-Z_]{2,}\]|</?s>|</?tool[^\s<>]*>|<(?:start|end)_of_turn>")


def conversations(text: str) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Four conversations, in which ``text`` stands in every place of the user's own words."""
    city = {"type": "string", "description": f"A city.{text}"}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    function = {"name": f"weather{text}", "description": f"The weather of a city.{text}", "parameters": parameters}
    call = {"name": f"weather{text}", "arguments": {"city": f"Rome{text}", "days": 2}}
    user = {"role": "user", "content": f"{text}Hi <b>there</b>, what about Rome?{text}"}
    answer = {"role": "assistant", "content": f"{text}Hello!{text}"}
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
    }
    result = {"role": "tool", "name": f"weather{text}", "tool_call_id": "call00001", "content": f'sunny & "warm"{text}'}
    system = {"role": "system", "content": f"Be brief.{text}"}
    more = {"role": "user", "content": f"  And\n\nnow? é{text} "}
    return {
        "one turn": ([user], {"add_generation_prompt": True}),
        "turns": ([system, user, answer, more], {"add_generation_prompt": True}),
        "tools": (
            [user, calls, result],
            {"add_generation_prompt": True, "tools": [{"type": "function", "function": function}]},
        ),
        "an answer": ([user, answer], {"add_generation_prompt": False}),
    }


def render(template: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> Traced | None:
    """The text, or None when the template does not take the conversation."""
    special = {name: own_text(token) for name, token in SPECIAL.items()}
    try:
        return ChatTemplate(template).render({**special, **template_values(messages, arguments)})
    except PromptError:
        return None


def render_by_transformers(template: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
    everything: dict[str, Any] = {**SPECIAL, **arguments}
    try:
        return str(render_jinja_template([messages], chat_template=template, **everything)[0][0])
    except Exception:
        return None


def tokenizer(controls: set[str]) -> Tokenizer:
    made = byte_tokenizer()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(controls)])
    return made


@pytest.mark.parametrize("conversation", conversations(""))
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_text_and_tokens_are_those_of_transformers(path: Path, conversation: str) -> None:
    template = path.read_text(encoding="utf-8")
    messages, arguments = conversations("")[conversation]
    expected = render_by_transformers(template, messages, arguments)
    text = render(template, messages, arguments)
    assert (None if text is None else str.__str__(text)) == expected
    if text is not None and expected is not None:
        plain = tokenizer(set(CONTROL.findall(expected)))
        control = ControlTokens(plain, ChatTemplate(template).literal_text)
        assert control.encode(text, special_tokens=False) == plain.encode(expected).ids


@pytest.mark.parametrize("conversation", conversations(""))
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_control_tokens_in_every_text_of_the_user_change_none(path: Path, conversation: str) -> None:
    template = path.read_text(encoding="utf-8")
    controls = {*CONTROL.findall(template), *SPECIAL.values()}
    plain = tokenizer(controls)
    control = ControlTokens(plain, ChatTemplate(template).literal_text)
    found = []
    for added in (".", f".{''.join(sorted(controls))}."):
        text = render(template, *conversations(added)[conversation])
        ids = [] if text is None else control.encode(text, special_tokens=False)
        found.append([token for token in ids if token in plain.get_added_tokens_decoder()])
    assert found[0] == found[1]
