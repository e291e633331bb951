"""Structured outputs and log-probabilities from end to end, with the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tsqp import LLM, SamplingParams, StructuredOutputsParams
from tsqp.errors import OptionError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "million": {"type": "integer", "maximum": 99}},
    "required": ["city", "million"],
    "additionalProperties": False,
}
PROMPT = "Name a large city and how many million people live there, as JSON."


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("default", protection="local") as made:
        yield made


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 40, **more})


def test_answers_are_json_by_the_schema_for_every_seed(llm: LLM) -> None:
    asked = params(structured_outputs=StructuredOutputsParams(json=SCHEMA))
    answers = [llm.generate(PROMPT, replace(asked, seed=seed))[0] for seed in range(3)]
    for answer in answers:
        value = json.loads(answer.text)
        assert answer.finish_reason == "stop"
        assert list(value) == ["city", "million"]
        assert isinstance(value["city"], str)
        assert isinstance(value["million"], int)
    assert len({answer.text for answer in answers}) > 1


def test_an_answer_without_room_for_its_form_is_cut_and_says_so(llm: LLM) -> None:
    asked = params(temperature=0.0, max_tokens=4, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    (answer,) = llm.generate(PROMPT, asked)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 4
    assert answer.text.startswith('{"city":')


def test_answers_of_a_batch_have_their_forms_by_themselves(llm: LLM) -> None:
    asked = params(
        seed=5, structured_outputs=StructuredOutputsParams(regex="(red|green|blue)( and (red|green|blue)){1,3}")
    )
    together = llm.generate(["Which colours?", "Colours of a flag:"], asked)
    assert all(set(answer.text.split(" and ")) <= {"red", "green", "blue"} for answer in together)


def test_log_probabilities_are_those_of_the_model_for_each_token(llm: LLM) -> None:
    (answer,) = llm.generate("Count to three.", params(seed=3, max_tokens=6, logprobs=2))
    assert answer.logprobs is not None
    assert [entry.token for entry in answer.logprobs] == list(answer.token_ids)
    logits = llm.logits([*answer.prompt_token_ids, *answer.token_ids])[len(answer.prompt_token_ids) - 1 :]
    expected = logits.double().log_softmax(-1)
    for entry, row in zip(answer.logprobs, expected, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=0.15)  # another batch shape, in bfloat16
        (first, most), (_, next_most) = entry.top
        assert first == int(row.argmax()) or most - next_most < 0.15


def test_deltas_have_the_log_probabilities_of_their_tokens(llm: LLM) -> None:
    asked = params(seed=3, max_tokens=6, logprobs=0)
    deltas = list(llm.stream("Count to three.", asked))
    last = deltas[-1].completion
    assert last is not None
    assert tuple(delta.logprobs for delta in deltas if delta.logprobs is not None) == last.logprobs
    assert all(entry.top == () for entry in last.logprobs or ())
    plain = list(llm.stream("Count to three.", replace(asked, logprobs=None)))
    assert [delta.text for delta in plain] == [delta.text for delta in deltas]
    assert plain[-1].completion == replace(last, logprobs=None)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"structured_outputs": StructuredOutputsParams(regex="(")}, "unclosed group"),
        ({"logit_bias": {49152: 1.0}}, "logit_bias must be ids of tokens, which end at 49151"),
        ({"stop_token_ids": (10**6,)}, "stop_token_ids must be ids of tokens, which end at 49151"),
    ],
    ids=["form", "bias", "stop"],
)
def test_what_this_model_cannot_do_is_refused_before_anything_is_computed(
    llm: LLM, asked: dict[str, Any], words: str
) -> None:
    before = llm.stats.forward_passes
    with pytest.raises(OptionError, match=words):
        llm.generate(PROMPT, params(**asked))
    assert llm.stats.forward_passes == before
