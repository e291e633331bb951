"""Templates get what transformers' environment gives them, and the same text comes out; a failure names its line."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.families import byte_tokenizer
from tsqp.checkpoint.base import TextFormat
from tsqp.errors import OptionError, PromptError
from tsqp.trusted.text.conversation import template_values
from tsqp.trusted.text.template import ChatTemplate
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.trusted.text.traced import own_text

SECRET = "my 'secret' <b>é</b>"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": {"type": "integer"}, "a": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": SECRET}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": None, "name": "é"},
    {"role": "user", "content": SECRET},
    {"role": "assistant", "content": "<think>hm</think>\n\nyes ", "tool_calls": [CALL], "thinking": "hm"},
    {"role": "tool", "content": [{"type": "text", "text": "4\n5"}]},
]
NESTED: list[Any] = []
NESTED.append(NESTED)  # without end
VALUES: dict[str, Any] = {"tools": TOOLS, "documents": [{"title": "T", "text": SECRET}], "enable_thinking": False}

TEMPLATES = {
    "generation": "{% for m in messages %}{% generation %}{{ m.role }} {% endgeneration %}{% endfor %}",
    "generation with trimmed ends": "a {%- generation -%} {{ messages[1].content }} {%- endgeneration -%} b",
    "break and continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
    "{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ messages[1] | tojson }}",
    "tojson with options": "{{ tools | tojson(indent=2) }}{{ messages[1] | tojson(ensure_ascii=True) }}"
    "{{ tools[0].function | tojson(separators=(',', ':'), sort_keys=True) }}{{ [1.5, none, true] | tojson(false, 4) }}",
    "tojson of the template's own": "{{ {'a': ['<b>', 1]} | tojson }}",
    "a date": "{{ strftime_now('%Y') | length }}{{ strftime_now('%Z|%z') }}",
    "documents": "{% for d in documents %}{{ d.title }}: {{ d['text'] }}{% endfor %}",
    "a free variable": "{{ enable_thinking }}{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
    "{{ other }}",
    "a default": "{% if not date is defined %}{% set date = '26 Jul' %}{% endif %}{{ date }}{{ other | default('x') }}",
    "special tokens": "{{ bos_token }}{{ bos_token + eos_token }}"
    "{% if pad_token is defined %}{{ pad_token }}{% endif %}",
    "generation prompt": "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "without a value": "{{ 'content' in messages[0] }}{{ messages[0].content is defined }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}{% endfor %}",
    "split": "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ '<think>' in messages[2].content }}",
    "safe": "{{ '<'|safe + messages[1].content + '>' }}{{ messages[1].content + ('>' | safe) }}"
    "{{ 'a' ~ ('<' | safe) }}",
    "escape": "{{ messages[1].content | e }}{{ '<' | escape }}",
    "macro": "{% macro call(c, sep=', ') %}{{ c.name }}({{ c.arguments.items() | map('join', '=') | join(sep) }})"
    "{% endmacro %}"
    "{{ call(messages[2].tool_calls[0].function) }}",
    "caller": "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}{{ messages[1].content }}{% endcall %}",
    "namespace": "{% set n = namespace(a='', i=0) %}{% for m in messages %}{% set n.a = n.a ~ m.role %}"
    "{% set n.i = n.i + 1 %}{% endfor %}{{ n.a }}{{ n.i }}",
    "dict": "{% set d = dict(a=1, b='x') %}{{ d.a }}{{ d | tojson }}{{ dict.fromkeys('ab', 1) }}",
    "format": "{{ '{}-{x}'.format('a', x=messages[1].content) }}{{ '%s %d' % ('a', 3) }}{{ '%s' | format('é') }}",
    "indent": "{{ messages[1].content | indent(2, true) }}{{ 'a\nb' | indent }}",
    "other filters": "{{ messages[1].content | title | replace('S', 'z') | truncate(9) | center(20) | wordwrap(5) }}"
    "{{ 'a b' | urlencode }}{{ [3, 1] | sort | first }}{{ 'abc' | reverse | upper | list }}"
    "{{ 'ab' | batch(1) | list }}",
    "select": "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content }}{% endfor %}"
    "{{ messages | map(attribute='role') | join('|') }}{{ messages | groupby('role') | length }}"
    "{{ messages | join(',', 'role') }}",
    "tests": "{{ messages[1].content is string }}{{ tools is mapping }}{{ tools is iterable }}{{ 'a' is eq 'a' }}"
    "{{ 'A' is upper }}",
    "cycle": "{% for m in messages %}{{ loop.cycle('odd', 'even') }}{% endfor %}{{ ['a', 'b'][1:] }}{{ ('a', 'b') }}",
    "white space": "\n{% if true %}\n  a\n{% endif %}\n{{- ' b' -}}\n\n c\n",
    "a set block": "{% set x %}{{ messages[1].content }}!{% endset %}{{ x | upper }}"
    "{% set y | trim %}  a {% endset %}{{ y }}",
    "a list of values": "{{ messages[2].tool_calls }}{{ [messages[1].content, 'own'] }}{{ {'own': 'own'} }}",
    "raise": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "an undefined name": "{{ missing.x }}",
    "no such element": "{{ messages[0].nothing.x }}",
    "no such number": "{{ messages[9].x }}",
    "append": "{% set x = [] %}{{ x.append(1) }}",
    "inner names": "{{ ''.__class__.__mro__ }}",
    "inner names of a namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "inner names set in a namespace": "{% set n = namespace() %}{% set n._x = 1 %}{{ n._x }}",
    "inner names by format": "{{ '{0.__class__}'.format('a') }}",
    "inner names of a text": "{{ 'a'._own }}{{ messages[1].content._own }}",
    "an unknown filter": "{{ 'a' | nonsense }}",
    "an unknown test": "{% if false %}{{ 'a' is nonsense }}{% endif %}",
    "a sum of kinds": "{{ 'a' + 1 }}",
    "not JSON": "{{ missing | tojson }}",
    "include": "{% include 'x' %}",
    "no template": "{% for %}",
    "a big range": "{% for i in range(10**9) %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    template, special = TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}
    without_none = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]
    try:
        arguments = {"add_generation_prompt": True, **special, **VALUES}
        expected = render_jinja_template([without_none], chat_template=template, **arguments)[0][0]
    except Exception:
        expected = None
    values = {"add_generation_prompt": True, **template_values(MESSAGES, VALUES)}
    own = {key: own_text(token) for key, token in special.items()}
    if expected is None:
        with pytest.raises(PromptError) as caught:
            ChatTemplate(template).render({**own, **values})
        assert "line 1" in str(caught.value) or "refuses" in str(caught.value)
    else:
        assert str.__str__(ChatTemplate(template).render({**own, **values})) == expected


def tokenizer(template: str, tool_template: str | None = None) -> Tokenizer:
    return Tokenizer(TextFormat(byte_tokenizer().to_str(), (), template, tool_template))


def failure(template: str, **arguments: object) -> str:
    """The error with a conversation. Neither it nor anything that it is chained to may hold what the user wrote."""
    messages = [*MESSAGES[1:3], {"role": "user", "content": SECRET, "secret_key": "secret"}]
    with pytest.raises(PromptError) as caught:
        tokenizer(template).encode_chat(messages, **arguments)
    error: BaseException | None = caught.value
    told = "".join(traceback.format_exception(caught.value))
    while error is not None:
        told += repr(error) + repr(error.args)
        error = error.__cause__ or error.__context__
    assert "secret" not in told.replace("secret_key", "")
    assert caught.value.__context__ is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("\n\n{{ missing.x }}", "line 3 of the chat template fails: 'missing' is undefined"),
        ("\n{{ messages[0].nothing.x }}", "line 2 of the chat template fails: a dict has no element 'nothing'"),
        ("{{ messages[7].x }}", "line 1 of the chat template fails: a list has no element 7"),
        ("{{ messages['se' + 'cond'].x }}", "a list has no element 'second'"),
        ("{{ messages[0].content.nothing.x }}", "a str has no element 'nothing'"),
        ("{{ messages[0][messages[0].content].x }}", "a dict has no element that was asked for"),
        ("{{ messages[0][messages[0].content[4:10]].x }}", "a dict has no element that was asked for"),
        ("{{ messages[0]|attr(messages[0].content) + 'x' }}", "a dict has no element that was asked for"),
        ("{{ [] | first + 'x' }}", "No first item"),
        (
            "a\n{% macro m() %}\n{{ 1 // 0 }}{% endmacro %}\n{{ m() }}",
            "line 3 of the chat template fails: ZeroDivisionError",
        ),
        ("\n{{ messages[0].content.center(messages[0].content) }}", "line 2 of the chat template fails: TypeError"),
        ("{{ messages[0].content | indent('x') + 1 }}", "TypeError: can only concatenate str (not "),
        ("{% for d in documents %}{% endfor %}", "TypeError: 'NoneType' object is not iterable"),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
        ("{{ messages[0].content * messages[0].content }}", "line 1 of the chat template fails: TypeError"),
        ("{{ {}[messages[0].content] + 1 }}", "line 1"),
        ("{{ messages | map(messages[0].content) | list }}", "line 1 of the chat template fails: TemplateRuntimeError"),
        ("\n{{ 'a' | nonsense }}", "line 2 of the chat template fails: No filter named 'nonsense'."),
        (
            "\n{% if messages %}{{ 'a' | nonsense }}{% endif %}",
            "line 2 of the chat template fails: there is no filter nonsense",
        ),
        (
            "\n{% if messages %}{{ 'a' is nonsense }}{% endif %}",
            "line 2 of the chat template fails: there is no test nonsense",
        ),
        ("\n\n{% for %}", "line 3 of the chat template fails: "),
        ("{% unknown %}", "line 1 of the chat template fails: Encountered unknown tag 'unknown'."),
        ("{% generation %}x", "line 1 of the chat template fails: "),
        ("\n{{ raise_exception('roles must alternate') }}", "refuses this conversation (line 2): roles must alternate"),
        ("{{ raise_exception('role ' ~ messages[0].content ~ ' is wrong') }}", "(line 1): role … is wrong"),
        ("{{ raise_exception('role {} is wrong'.format(messages[0].content)) }}", "(line 1): role … is wrong"),
        ("{{ raise_exception(messages[0].content) }}", "the chat template refuses this conversation (line 1)"),
        ("{{ raise_exception(messages) }}", "the chat template refuses this conversation (line 1)"),
        ("{{ raise_exception('a\x1b[31m\nb') }}", "(line 1): a [31m b"),
        ("{{ messages.append(1) }}", "line 1 of the chat template fails: "),
        ("{{ messages[0].__class__.x }}", "line 1 of the chat template fails: "),
    ],
)
def test_a_failure_names_the_line_and_what_is_missing(template: str, words: str) -> None:
    assert words in failure(template)


def test_a_system_prompt_that_the_template_refuses() -> None:
    """As Gemma's does: its own words are the error, and the user's are not in it."""
    chat = tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    user = {"role": "user", "content": "hi"}
    assert chat.decode(chat.encode_chat([user])) == "hi"
    with pytest.raises(PromptError) as caught:
        chat.encode_chat([{"role": "system", "content": "secret"}, user])
    assert str(caught.value) == "the chat template refuses this conversation (line 1): System role not supported"


def test_an_argument_is_named_only_by_its_name() -> None:
    assert "a dict has no element 'x'" in failure("{{ options.x.y }}", options={"y": "secret"})


def test_variables_of_a_template_by_keyword() -> None:
    chat = tokenizer("{{ enable_thinking }} {{ effort }} {{ add_generation_prompt }}{{ tools[0].name if tools }}")
    user = [{"role": "user", "content": "x"}]
    assert chat.decode(chat.encode_chat(user)) == "  True"
    arguments = {"enable_thinking": False, "effort": "high", "add_generation_prompt": False, "tools": [{"name": "f"}]}
    assert chat.decode(chat.encode_chat(user, **arguments)) == "False high Falsef"


def test_a_variable_that_the_template_does_not_read_is_refused() -> None:
    chat = tokenizer("{% set other = 1 %}{{ messages[0].content }}{{ enable_thinking }}{{ other }}")
    for name in ("enable_thinkin", "other", "tools"):
        with pytest.raises(OptionError, match=f"reads no {name}$"):
            chat.encode_chat([{"role": "user", "content": "x"}], **{name: []})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tools": "x"}, "tools must be a list of mappings"),
        ({"tools": [print]}, "plain data only, no builtin_function_or_method"),
        ({"documents": ["x"]}, "documents must be a list of mappings"),
        ({"prompt": "x"}, "cannot be called prompt"),
        ({"a-b": 1}, "letters, digits and underscores"),
        ({"x": {1, 2}}, "plain data only, no set"),
        ({"x": NESTED}, "nested at most 128 deep"),
        ({"x": object()}, "plain data only, no object"),
    ],
)
def test_arguments_that_no_template_can_take(arguments: dict[str, object], words: str) -> None:
    with pytest.raises((OptionError, PromptError), match=words):
        tokenizer("{{ tools }}{{ documents }}{{ x }}").encode_chat([{"role": "user", "content": "x"}], **arguments)


@pytest.mark.parametrize("message", ["text", ["role", "user"], {"role": "user", "content": object()}])
def test_messages_are_mappings_of_plain_data(message: Any) -> None:
    with pytest.raises(PromptError):
        tokenizer("{{ messages }}").encode_chat([message])


def test_text_of_a_kind_of_its_own_is_plain_text_to_a_template() -> None:
    class Loud(str):
        def shout(self) -> str:
            raise AssertionError("called by a template")

    chat = tokenizer("{{ messages[0].content.shout is defined }}{{ messages[0].content }}")
    assert chat.decode(chat.encode_chat([{"role": "user", "content": Loud("x")}])) == "Falsex"
    assert len(chat.encode_chat([{"role": "user", "content": own_text("x")}])) == len("Falsex")


def test_a_conversation_with_tools_takes_the_template_for_tools() -> None:
    user = [{"role": "user", "content": "x"}]
    chat = tokenizer("plain", "with tools{{ tools | length }}")
    assert chat.decode(chat.encode_chat(user)) == "plain"
    assert chat.decode(chat.encode_chat(user, tools=[])) == "with tools0"
    with pytest.raises(OptionError, match="reads no tools"):
        tokenizer("plain").encode_chat(user, tools=[])
