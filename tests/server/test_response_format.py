"""Forms that are none: the reason is told, without a word of the schema."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.serving import VOCAB, chat_tokenizer
from tsqp.errors import OptionError
from tsqp.server.errors import ApiError
from tsqp.server.response_format import form_errors, form_of
from tsqp.server.tools import Function, _form

TOKENIZER = chat_tokenizer()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "canary"}, "Invalid type: …"),
        ({"$ref": "#/canary"}, "Pointer '/…' does not exist"),
        ({"pattern": "(canary"}, "unclosed group"),
        (
            {"type": "string", "pattern": "(?=canary)"},
            "look-around, including look-ahead and look-behind, is not supported",
        ),
        ({"not": {"const": "canary"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "object", "dependentSchemas": {}}, 'Unimplemented keys: ["dependentSchemas"]'),
        ({"type": "string", "format": "canary"}, "Unknown format: …"),
        (
            {"type": "object", "required": ["canary"], "properties": {"canary": False}},
            "Unsatisfiable schema: required property '…' is unsatisfiable",
        ),
        (
            {"type": "array", "minItems": 4711, "maxItems": 2},
            "Unsatisfiable schema: minItems (…) is greater than maxItems (…)",
        ),
    ],
)
def test_the_reason_is_told_without_a_word_of_the_schema(schema: dict[str, Any], reason: str) -> None:
    form = form_of("json_schema", schema, "")
    assert form is not None
    with pytest.raises(ApiError) as refused, form_errors("text.format"):
        TOKENIZER.grammar(form, VOCAB)
    assert refused.value.body.param == "text.format"
    assert refused.value.body.message == f"text.format cannot be used: {reason}"
    assert "canary" not in refused.value.encode().decode()


def test_what_the_package_says_itself_is_told_as_it_is() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"a": deep}
    with pytest.raises(ApiError) as refused, form_errors("response_format"):
        form_of("json_schema", deep, "")
    assert refused.value.body.message == "response_format must be a JSON schema of plain data"


def test_a_form_of_calls_is_the_tools_fault() -> None:
    form = _form([Function(name="f", parameters={"properties": {"canary": {"type": "canary"}}})], "hermes", True)
    with pytest.raises(ApiError) as refused, form_errors("response_format"):
        TOKENIZER.grammar(form, VOCAB)
    assert refused.value.body.param == "tools"
    assert "canary" not in refused.value.body.message


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(OptionError), form_errors("response_format"):
        raise OptionError("seed must be less", fields=("seed",))
