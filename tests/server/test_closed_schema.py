"""Objects that list their properties end with them; whatever fits then fits what the client said."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.chat_model import IM_END
from tests.server.serving import VOCAB, chat_tokenizer
from tsqp.errors import InputError, OptionError
from tsqp.server.closed_schema import closed
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
from tsqp.trusted.text.grammar import GrammarMatcher

TOKENIZER = chat_tokenizer()
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
SHUT = {**CITY, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (CITY, SHUT),
        ({"type": "object", "properties": {}}, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({"type": "array", "items": CITY}, {"type": "array", "items": SHUT}),
        ({"anyOf": [CITY, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
        ({"$ref": "#/$defs/c", "$defs": {"c": CITY}}, {"$ref": "#/$defs/c", "$defs": {"c": SHUT}}),
        ({"oneOf": [CITY], "discriminator": {}}, {"oneOf": [SHUT], "discriminator": {}}),
    ],
)
def test_objects_that_list_their_properties_get_no_others(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == expected
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**CITY, "additionalProperties": True},
        {**CITY, "additionalProperties": {"type": "string"}},
        {**CITY, "required": ["other"]},
        {**CITY, "required": [["city"]]},
        {**CITY, "required": 1},
        {**CITY, "patternProperties": {"a": {}}},
        {**CITY, "minProperties": 2},
        {"allOf": [CITY, {"type": "object", "properties": {"large": {}}}]},
        {"type": "array", "items": {"allOf": [CITY]}, "prefixItems": [CITY]},
        {"properties": {"a": {"$ref": "#/$defs/c", "properties": {"b": {}}}}, "$defs": {"c": CITY}},
        {**CITY, "anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"oneOf": [CITY, {"type": "object", "properties": {"large": {}}}]},
        {"properties": 1},
        {"properties": {"a": 1}},
        {"items": [CITY]},
        {"anyOf": CITY},
    ],
)
def test_others_stay_as_they_are(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def matcher(schema: dict[str, Any]) -> GrammarMatcher:
    return TOKENIZER.grammar(StructuredOutputsParams(json=schema), VOCAB).matcher()


NAMES = st.sampled_from(["a", "b", "c"])
LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [{"type": "boolean"}, {"type": "null"}, {"enum": ["x", 1]}, {"$ref": "#/$defs/d"}, {}, {"type": "object"}, True]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    more = {
        "required": st.lists(NAMES, max_size=2),
        "additionalProperties": inner,
        "allOf": st.lists(inner, min_size=1, max_size=2),
        "anyOf": st.lists(inner, min_size=1, max_size=2),
        "oneOf": st.lists(inner, min_size=1, max_size=2),
    }
    properties = st.dictionaries(NAMES, inner, max_size=2)
    return st.fixed_dictionaries({"type": st.just("object"), "properties": properties}, optional=more)


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=6,
)


@settings(max_examples=80)
@given(st.dictionaries(NAMES, SCHEMAS, min_size=1, max_size=2), objects(LEAVES), st.integers(0, 2**32))
def test_what_fits_then_fits_what_the_client_said(properties: dict[str, Any], d: dict[str, Any], seed: int) -> None:
    schema = {"type": "object", "properties": properties, "required": list(properties), "$defs": {"d": d}}
    try:
        client = matcher(schema)
    except OptionError:
        return  # the library can do nothing with it, closed or not
    try:
        ours = matcher(closed(schema))
    except OptionError as error:
        pytest.fail(f"closed, it cannot be used any more: {error}")
    chance = random.Random(seed)
    for _ in range(200):
        allowed = [int(token) for token in np.flatnonzero(ours.allowed())]
        token = chance.choice(allowed)
        if token == IM_END:
            assert client.complete
            return
        ours.accept(token)
        try:
            client.accept(token)
        except InputError:
            pytest.fail("the client's schema does not allow this")
