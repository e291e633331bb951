"""What a caller may say about sampling, and the one line that each fault gets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tsqp import SamplingParams
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import MAX_TOKENS_NAMED
from tsqp.trusted.engine.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams

WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": None},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": math.nan},
    {"temperature": -0.1},
    {"temperature": 2.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "1"},
    {"temperature": None},
    {"temperature": True},
    {"top_k": -1},
    {"top_k": 3.0},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_p": math.nan},
    {"min_p": 1.0},
    {"min_p": -0.1},
    {"min_p": math.nan},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 1e-40},
    {"repetition_penalty": math.inf},
    {"repetition_penalty": math.nan},
    {"frequency_penalty": 2.1},
    {"frequency_penalty": -2.1},
    {"frequency_penalty": math.nan},
    {"presence_penalty": 3},
    {"presence_penalty": 1 << 40_000},
    {"presence_penalty": -math.inf},
    {"seed": 2**70},
    {"seed": 1 << 40_000},
    {"seed": 1.0},
    {"stop": ("",)},
    {"stop": 3},
    {"stop": (3,)},
    {"stop": {"a": 1}},
    {"stop": b"bytes"},
    {"stop": ["x"] * 65},
    {"stop": "x" * 257},
    {"stop_token_ids": (3, -1)},
    {"stop_token_ids": "34"},
    {"stop_token_ids": 3},
    {"stop_token_ids": (3.0,)},
    {"logit_bias": {1: 100.5}},
    {"logit_bias": {1: math.nan}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {"1": 1.0}},
    {"logit_bias": {True: 1.0}},
    {"logit_bias": [1.0]},
    {"logprobs": 21},
    {"logprobs": -1},
    {"logprobs": True},
    {"structured_outputs": {"json_object": True}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_each_fault_is_one_short_line_that_begins_with_its_field(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(OptionError) as refused:
        SamplingParams(**wrong)
    text = str(refused.value)
    assert text.startswith(f"{name} must be ")
    assert len(text.splitlines()) == 1
    assert len(text) < 120
    assert refused.value.fields == (name,)


def test_an_error_repeats_no_text() -> None:
    every: list[dict[str, Any]] = [
        {"stop": ["my secret", ""]},
        {"temperature": "my secret"},
        {"logit_bias": {"my secret": 1}},
    ]
    for wrong in every:
        with pytest.raises(OptionError) as refused:
            SamplingParams(**wrong)
        assert "secret" not in str(refused.value)


def test_every_bound_itself_is_allowed() -> None:
    low: dict[str, Any] = {
        "temperature": 0,
        "top_p": 1e-9,
        "frequency_penalty": -2,
        "presence_penalty": -2,
        "seed": -(2**63),
    }
    high: dict[str, Any] = {
        "temperature": 2,
        "top_p": 1,
        "frequency_penalty": 2,
        "presence_penalty": 2,
        "seed": 2**63 - 1,
    }
    for bounds in (low, high):
        made = SamplingParams(**bounds, logit_bias={0: -100, 1: 100}, logprobs=20)
        assert made.logit_bias == {0: -100.0, 1: 100.0}


def test_values_are_of_one_kind_whatever_was_given() -> None:
    given: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(3), "stop": ["a"], "stop_token_ids": [1]}
    made = SamplingParams(**given)
    assert made == SamplingParams(temperature=0.5, top_k=3, stop=("a",), stop_token_ids=(1,))
    assert [type(value) for value in (made.temperature, made.top_k)] == [float, int]
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]


def test_params_are_a_value() -> None:
    biases = {1: 2.0}
    first, second = (SamplingParams(logit_bias=biases, stop=("x",)) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    biases[1] = 3.0
    assert first.logit_bias == {1: 2.0}
    assert replace(first, seed=1) == SamplingParams(logit_bias={1: 2.0}, stop=("x",), seed=1)


def test_tokens_that_a_model_does_not_have_are_refused_by_name() -> None:
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=(9,)).check_vocabulary(10)
    for name, params in (
        ("logit_bias", SamplingParams(logit_bias={10: 1.0})),
        ("stop_token_ids", SamplingParams(stop_token_ids=(10,))),
    ):
        with pytest.raises(OptionError, match=rf"^{name} must be ids of tokens, which end at 9 in this model, not 10$"):
            params.check_vocabulary(10)


def test_an_answer_that_has_its_form_ends() -> None:
    with pytest.raises(OptionError, match="ignore_eos and structured_outputs exclude each other"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(json_object=True))


STRUCTURED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of"),
    ({"json_object": True, "regex": "a"}, "exactly one of"),
    ({"json": "{"}, r"structured_outputs\.json must be JSON: look at character 2"),
    ({"json": "[1]"}, r"structured_outputs\.json must be a JSON schema: an object"),
    ({"json": "true"}, r"structured_outputs\.json must be a JSON schema: an object"),
    ({"json": ["secret"]}, r"structured_outputs\.json must be a JSON schema"),
    ({"json": {"a": {1}}}, r"structured_outputs\.json must be a JSON schema of plain data"),
    ({"json": {"a": math.nan}}, r"structured_outputs\.json must be a JSON schema of plain data"),
    ({"json": '{"a":' * 100_000}, r"structured_outputs\.json must be"),
    ({"json": '{"maximum": ' + "1" * 10_000 + "}"}, "not nested too deeply"),
    ({"regex": ""}, r"structured_outputs\.regex must be text of 1 to"),
    ({"regex": "a" * (MAX_CHARACTERS + 1)}, r"structured_outputs\.regex must be text of 1 to"),
    ({"regex": 3}, r"structured_outputs\.regex must be text"),
    ({"regex": "\ud800"}, r"structured_outputs\.regex must be Unicode text"),
    ({"grammar": b"start: 1"}, r"structured_outputs\.grammar must be text"),
    ({"grammar": 'start: "a"\n%llguidance {}'}, r"structured_outputs\.grammar must be without options"),
    ({"choice": "yes"}, r"structured_outputs\.choice must be a list of strings"),
    ({"choice": ()}, r"structured_outputs\.choice must be a list of 1 to"),
    ({"choice": ["yes", ""]}, r"structured_outputs\.choice must be text"),
    ({"choice": ["a"] * 1025}, r"structured_outputs\.choice must be a list of 1 to"),
    ({"choice": [3]}, r"structured_outputs\.choice must be text"),
    ({"json_object": "yes"}, r"structured_outputs\.json_object must be"),
]


@pytest.mark.parametrize(("wrong", "words"), STRUCTURED, ids=lambda value: str(value)[:40])
def test_forms_that_are_none_are_refused_by_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as refused:
        StructuredOutputsParams(**wrong)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_form_is_a_value_and_names_its_kind() -> None:
    schema = {"type": "object", "title": "é"}
    first, second = (
        StructuredOutputsParams(json=schema),
        StructuredOutputsParams(json='{"type": "object", "title": "é"}'),
    )
    assert first == second
    assert hash(first) == hash(second)
    kinds = (first, StructuredOutputsParams(json_object=True), StructuredOutputsParams(choice=["a"]))
    assert [params.kind for params in kinds] == ["json", "json_object", "choice"]


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_tokens_are_named_in_bounded_numbers(name: str) -> None:
    """Each is looked at in Python for every choice of a request."""
    for count in (MAX_TOKENS_NAMED, MAX_TOKENS_NAMED + 1):
        given: Any = dict.fromkeys(range(count), 0.0) if name == "logit_bias" else list(range(count))
        if count > MAX_TOKENS_NAMED:
            with pytest.raises(OptionError, match=str(MAX_TOKENS_NAMED)):
                SamplingParams(**{name: given})
        else:
            SamplingParams(**{name: given})
