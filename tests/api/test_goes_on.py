"""An answer goes on with a text, or is a turn of its own: whether its first token has its space."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.commands import LIMIT_S
from tests.words import TEMPLATE, words_model
from tsqp import LLM, AsyncLLM, Completion, ComputeConfig, SamplingParams

TEXT, IDS = "w3 w4", [3, 4]
BOTH: list[str | list[int]] = [TEXT, IDS]
TALK: Any = [{"role": "user", "content": TEXT}]
PARAMS = SamplingParams(max_tokens=3)
SPACE_STOPS = SamplingParams(max_tokens=3, stop=(" ",))


@pytest.fixture(params=[None, TEMPLATE], ids=["no template", "a template"])
def template(request: pytest.FixtureRequest) -> Any:
    return request.param


def opened(directory: Path, template: str | None) -> LLM:
    model = words_model(directory, template)
    return LLM(str(model), protection="local", compute=ComputeConfig(dtype="float32"))


def last(deltas: list[Any]) -> Completion:
    completion = deltas[-1].completion
    assert isinstance(completion, Completion)
    assert "".join(delta.text for delta in deltas) == completion.text
    return completion


def test_an_answer_goes_on_with_a_raw_text_with_tokens_and_with_a_text_without_a_template(
    tmp_path: Path, template: str | None
) -> None:
    with opened(tmp_path, template) as llm:
        turn, ids, raw = *llm.generate(BOTH, PARAMS), *llm.generate(TEXT, PARAMS, raw=True)
        streamed = [last(list(llm.stream(*asked))) for asked in ((TEXT, PARAMS), (IDS, PARAMS))]
        (stopped,) = llm.generate(IDS, SPACE_STOPS)
        of_its_own = llm.tokenizer.decode(ids.token_ids)
    assert turn.token_ids == ids.token_ids == raw.token_ids
    assert ids.text == raw.text == f" {of_its_own}"
    assert turn.text == (of_its_own if template else f" {of_its_own}")
    assert streamed == [turn, ids]
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_an_answer_in_a_conversation_is_a_text_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path, TEMPLATE) as llm:
        talk = last(list(llm.chat(TALK, PARAMS)))
        assert talk.text == llm.tokenizer.decode(talk.token_ids)


def test_it_is_the_same_for_asyncio(tmp_path: Path, template: str | None) -> None:
    async def test() -> None:
        async with AsyncLLM(opened(tmp_path, template)) as llm:
            expected = [*llm.llm.generate(BOTH, PARAMS), *llm.llm.generate(TEXT, PARAMS, raw=True)]
            asked: list[tuple[Any, bool]] = [(TEXT, False), (IDS, False), (TEXT, True)]
            assert [await llm.generate(prompt, PARAMS, raw=raw) for prompt, raw in asked] == expected
            streamed = [[delta async for delta in llm.stream(prompt, PARAMS, raw=raw)] for prompt, raw in asked]
            assert [last(deltas) for deltas in streamed] == expected
            if template is not None:
                assert last([delta async for delta in llm.chat(TALK, PARAMS)]).text == expected[0].text
            async with await llm.open(IDS, PARAMS, goes_on=False) as answer:
                assert last([delta async for delta in answer]).text == expected[1].text.removeprefix(" ")

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))
