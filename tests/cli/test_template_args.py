"""``--template-arg`` tells a chat template what it asks for; a wrong one is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Result
from tests.families import byte_tokenizer, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.cli.prompt_text import template_args
from tsqp.errors import OptionError, PromptError

LOCAL = ("--protection", "local", "--dtype", "float32", "-n", "4")
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}
{%- if thinking is defined %}{{ thinking }}{% endif %}
{%- for m in messages %}<s>{{ m.content }}{% endfor %}{{ style }}
{%- if style == 'wrong' %}{{ raise_exception('no such style') }}{% endif %}"""
Command = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with a chat template that has variables."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model("llama").directory, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    plain = byte_tokenizer()
    plain.add_special_tokens(["<s>"])
    plain.save(str(copy / "tokenizer.json"))
    return copy


def expected(text: str) -> list[int]:
    """What the model answers to the text that the template makes; ``<s>`` is token 256 where the template writes it."""
    before, _, after = text.partition("<s>")
    letters = byte_tokenizer()
    return tiny_model("llama").greedy([*letters.encode(before).ids, 256, *letters.encode(after).ids], 4)


def test_values_are_json_or_text() -> None:
    given = ["a=true", "b=False", "c=none", "d=null", "e=-3", "f=2.5e3", 'g=[1, {"x": "y"}]', 'h="5"', "i=five", "j="]
    values = {"a": True, "b": False, "c": None, "d": None, "e": -3, "f": 2500.0, "g": [1, {"x": "y"}], "h": "5"}
    more = ["k=a=b", "l=007", "m=1,5", "n=nan", "o= 1", "p=" + "9" * 6000]
    assert template_args(given) == {**values, "i": "five", "j": ""}
    assert template_args(more) == {"k": "a=b", "l": "007", "m": "1,5", "n": "nan", "o": " 1", "p": "9" * 6000}


def test_a_variable_reaches_the_template(tsqp: Command, model: Path) -> None:
    arguments = ("--template-arg", "thinking=false", "--template-arg", "style=plain", "--json")
    result = tsqp("generate", "Hi<s>", "--model", model, *LOCAL, *arguments)
    assert result.code == 0, result.err
    assert result.json["token_ids"] == expected("False<s>Hi<s>plain")
    tools = ("--template-arg", 'tools=[{"name": "<s>"}]', "--json")
    result = tsqp("generate", "Hi", "--model", model, *LOCAL, *tools)
    assert result.code == 0, result.err
    plain = byte_tokenizer()
    assert len(result.json["token_ids"]) == 4
    with LLM(str(model), protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        completion = llm.generate("Hi", SamplingParams(max_tokens=4), tools=[{"name": "<s>"}])[0]
    letters = plain.encode('[{"name": "<s>"}]').ids
    assert list(completion.prompt_token_ids) == [*letters, 256, *plain.encode("Hi").ids]
    assert list(completion.token_ids) == result.json["token_ids"]


def test_raw_keeps_control_tokens_and_takes_no_variable(tsqp: Command, model: Path) -> None:
    result = tsqp("generate", "Hi<s>", "--model", model, *LOCAL, "--raw", "--json")
    plain = byte_tokenizer()
    assert result.json["token_ids"] == tiny_model("llama").greedy([*plain.encode("Hi").ids, 256], 4)
    result = tsqp("generate", "Hi", "--model", model, *LOCAL, "--raw", "--template-arg", "style=x")
    assert result.code == 2
    assert "leave out --template-arg" in result.error
    with LLM(str(model), protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        with pytest.raises(OptionError, match="leave out style"):
            llm.generate("Hi", raw=True, style="x")
        with pytest.raises(OptionError, match="leave out style"):
            llm.generate([[1, 2]], style=False)


def test_chat_takes_variables(tsqp: Command, model: Path) -> None:
    result = tsqp("chat", "--model", model, *LOCAL, "--template-arg", "style=plain", stdin="Hi\n")
    assert result.code == 0, result.err
    assert result.out.rstrip("\n") == byte_tokenizer().decode(expected("<s>Hiplain")).rstrip("\n")


WRONG: dict[str, tuple[list[str], str]] = {
    "no value": (["thinking"], "takes NAME=VALUE"),
    "no name": (["=x"], "letters, digits and underscores"),
    "no such name": (["a b=x"], "letters, digits and underscores"),
    "twice": (["style=x", "style=y"], "style is given twice"),
    "the messages": (["messages=[]"], "cannot be called messages"),
    "no JSON": (["tools=[secret"], "tools begins like JSON and is none: look at character"),
    "deep JSON": (["tools=" + "[" * 100_000], "nested too deeply"),
    "tools of another kind": (["tools=secret"], "tools must be a list of mappings"),
    "no variable of the template": (["thinkin=secret"], "reads no thinkin"),
    "refused by the template": (["style=wrong"], "(line 4): no such style"),
    "not text": (["style=\udcff"], "style is not UTF-8 text"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_wrong_one_is_one_line(tsqp: Command, model: Path, command: str, name: str) -> None:
    given, words = WRONG[name]
    arguments = [word for value in given for word in ("--template-arg", value)]
    result = tsqp(command, *(["Hi"] if command == "generate" else []), "--model", model, *LOCAL, *arguments)
    assert result.code == 2
    assert words in result.error
    assert "secret" not in result.error


def test_a_variable_needs_a_template(tsqp: Command) -> None:
    result = tsqp("generate", "Hi", "--model", tiny_model("llama").directory, *LOCAL, "--template-arg", "style=x")
    assert result.code == 2
    assert "no chat template" in result.error


def test_variables_by_keyword(model: Path) -> None:
    with LLM(str(model), protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        deltas = list(llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=4), thinking=True))
        completion = deltas[-1].completion
        assert completion is not None
        assert llm.tokenizer.decode(completion.prompt_token_ids) == "TrueHi"
        assert list(completion.token_ids) == expected("True<s>Hi")
        with pytest.raises(PromptError, match="no such style"):
            llm.generate("Hi", style="wrong")
        with pytest.raises(OptionError, match="reads no stile"):
            list(llm.stream("Hi", stile=json.loads("1")))
