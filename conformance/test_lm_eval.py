"""lm-eval's ``local-completions``: what it says of a model is what the library computes."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from conformance.conftest import PRODUCT, ROOT
from conformance.target import Target

QUESTIONS = [
    {"question": "The capital of Norway is", "choices": ["Oslo", "Rome", "Paris"], "answer": 0},
    {"question": "The capital of Italy is", "choices": ["Oslo", "Rome", "Paris"], "answer": 1},
    {"question": "Ice is", "choices": ["hot", "cold", "naïve €"], "answer": 1},
]
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
PROSE = """\
task: tiny_prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
WRITES = """\
task: tiny_writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["\\n", "Q:", "###"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("prose", PROSE), ("writes", WRITES)):
        (directory / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return TaskManager(include_path=str(directory), include_defaults=False)


HUB = {"tokenizer_backend": "huggingface"}  # beside the directory of the model, in place of the hub
SERVER = {"tokenizer_backend": "auto"}  # it finds /tokenizer_info


def arguments(target: Target, **options: Any) -> dict[str, Any]:
    told = {
        "model": target.model,
        "base_url": f"{target.api}/completions",
        "header": {"Authorization": f"Bearer {target.key}"},
        "auth_token": target.key,
        "max_retries": 1,
        **options,
    }
    return told if options["tokenizer_backend"] == "auto" else {**told, "tokenizer": target.directory}


def evaluated(target: Target, tasks: TaskManager, task: str, **options: Any) -> list[dict[str, Any]]:
    """What was asked and answered, sample by sample."""
    found = simple_evaluate(
        model="local-completions", model_args=arguments(target, **options), tasks=[task], task_manager=tasks
    )
    return found["samples"][task]


def by_the_library(target: Target, asked: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    done = subprocess.run(
        [PRODUCT, "-m", "conformance.scores"],
        cwd=ROOT,
        input=json.dumps({"model": target.directory, "asked": asked}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [(score, likeliest) for score, likeliest in json.loads(done.stdout)]


@pytest.mark.parametrize(
    "options", [{**HUB, "batch_size": 1}, {**HUB, "batch_size": 4}, {**HUB, "num_concurrent": 4}, SERVER]
)
def test_scores_are_those_of_the_library(target: Target, tasks: TaskManager, options: dict[str, Any]) -> None:
    samples = evaluated(target, tasks, "tiny_choice", **options)
    model = LocalCompletionsAPI(**arguments(target, **options))
    asked, told = [], []
    for sample in samples:
        for pair, response in zip(sample["arguments"], sample["resps"], strict=True):
            context, continuation = model._encode_pair(*pair)
            asked.append((context + continuation, len(context)))
            told.append(response[0])
    assert len(told) == sum(len(one["choices"]) for one in QUESTIONS)
    for (score, likeliest), expected in zip(told, by_the_library(target, asked), strict=True):
        assert (pytest.approx(float(score), abs=1e-9), likeliest) == expected


@pytest.mark.parametrize("options", [HUB, SERVER])
def test_a_text_is_as_likely_as_the_library_says(target: Target, tasks: TaskManager, options: dict[str, Any]) -> None:
    samples = evaluated(target, tasks, "tiny_prose", **options)
    model = LocalCompletionsAPI(**arguments(target, **options))
    texts = [model.tok_encode(one["question"]) for one in QUESTIONS]
    expected = by_the_library(target, [([model.prefix_token_id, *text], 1) for text in texts])
    by_text = {sample["arguments"][0][0]: float(sample["resps"][0][0]) for sample in samples}
    told = [by_text[one["question"]] for one in QUESTIONS]
    assert told == pytest.approx([score for score, _ in expected], abs=1e-9)


def test_answers_end_before_their_stop_strings(target: Target, tasks: TaskManager) -> None:
    samples = evaluated(target, tasks, "tiny_writes", **HUB, batch_size=2)
    answers = [sample["resps"][0][0] for sample in samples]
    assert len(answers) == len(QUESTIONS)
    assert all(isinstance(answer, str) and "\n" not in answer for answer in answers)
