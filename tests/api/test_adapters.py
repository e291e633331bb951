"""From ``[NAME=]PATH`` to adapters that answer: names, digests, and what is refused before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import merged, write_adapter
from tests.families import random_tokens, tiny_model
from tests.trusted.guard.hostile import serve
from tsqp import LLM, AsyncLLM, ComputeConfig, GuardConfig, SamplingParams
from tsqp.api.adapters import NO_ADAPTERS, load_adapters, named_paths
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.adapter import Adapter
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, ModelMismatch, OptionError

LLAMA = tiny_model("llama")
MODEL = str(LLAMA.directory)
PARAMS = SamplingParams(max_tokens=8)
PROMPT = random_tokens(12)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(directory / name, LLAMA, seed=seed) for seed, name in enumerate(("books", "law"))}


@pytest.fixture(scope="module")
def llm(paths: dict[str, Path]) -> Iterator[LLM]:
    compute = ComputeConfig(dtype="float32", lora=(str(paths["books"]), f"other={paths['law']}"))
    with LLM(MODEL, protection="local", compute=compute) as llm:
        yield llm


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["/a/books"], {"books": "/a/books"}),
        (["books"], {"books": "books"}),
        (["x=/a/books"], {"x": "/a/books"}),
        (["x=a=b"], {"x": "a=b"}),
        (["/a=b/books"], {"books": "/a=b/books"}),
        (["./a=b"], None),  # the name would be a=b
        (["x=/a/", "/a/y"], {"x": "/a", "y": "/a/y"}),
        (["x=/a", "/b/x"], None),
        (["x=/a", "x=/b"], None),
        (["x="], None),
        ([""], None),
        (["="], None),
        (["=/a"], None),
        (["-x=/a"], None),
        (["a b=/a"], None),
        (["é=/a"], None),
        (["a:b=/a"], None),
        ([f"{'n' * 64}=/a"], {"n" * 64: "/a"}),
        ([f"{'n' * 65}=/a"], None),
        (["x=/a\0b"], None),
        (["/a/canary\nx"], None),
    ],
)
def test_names_and_paths(given: list[str], expected: dict[str, str] | None) -> None:
    if expected is not None:
        assert named_paths(given) == {name: Path(path) for name, path in expected.items()}
        return
    with pytest.raises(OptionError) as refused:
        named_paths(given)
    assert refused.value.fields == ("compute.lora",)
    assert "\n" not in str(refused.value)


def test_one_path_is_a_list_of_one() -> None:
    given: Any = "x=/a"
    assert ComputeConfig(lora=given).lora == ("x=/a",)
    given = ["x=/a"]
    assert ComputeConfig(lora=given) == ComputeConfig(lora=("x=/a",))


def test_names_and_digests_are_told(llm: LLM, paths: dict[str, Path]) -> None:
    assert llm.adapters == {"books": Adapter(paths["books"]).digest, "other": Adapter(paths["law"]).digest}


@pytest.mark.parametrize(("name", "path"), [("books", "books"), ("other", "law")])
def test_every_call_takes_an_adapter(llm: LLM, name: str, path: str, paths: dict[str, Path]) -> None:
    expected = merged(LLAMA, paths[path]).greedy(PROMPT, 8)
    assert list(llm.generate([PROMPT, PROMPT], PARAMS, lora=name)[1].token_ids) == expected
    last = [delta.completion for delta in llm.stream(PROMPT, PARAMS, lora=name)][-1]
    assert last is not None
    assert list(last.token_ids) == expected
    assert list(llm.generate(PROMPT, PARAMS)[0].token_ids) == LLAMA.greedy(PROMPT, 8) != expected


def test_every_asynchronous_call_takes_an_adapter(paths: dict[str, Path]) -> None:
    names = {None: LLAMA, "books": merged(LLAMA, paths["books"]), "law": merged(LLAMA, paths["law"])}
    compute = ComputeConfig(dtype="float32", lora=tuple(map(str, paths.values())))

    async def test() -> None:
        async with AsyncLLM(LLM(MODEL, protection="local", compute=compute)) as model:

            async def streamed(name: str | None) -> Any:
                return [delta async for delta in model.stream(PROMPT, PARAMS, lora=name)][-1].completion

            for name, oracle in names.items():
                expected = oracle.greedy(PROMPT, 8)
                assert list((await model.generate(PROMPT, PARAMS, lora=name)).token_ids) == expected
                assert list((await streamed(name)).token_ids) == expected
            with pytest.raises(OptionError, match="books, law"):
                await model.open(PROMPT, PARAMS, lora="none")

    asyncio.run(test())


def test_an_unknown_adapter_is_refused_with_those_there_are(llm: LLM) -> None:
    for call in (
        lambda: llm.generate(PROMPT, PARAMS, lora="law"),
        lambda: list(llm.stream(PROMPT, PARAMS, lora="law")),
        lambda: llm.logits(PROMPT, lora="law"),
    ):
        with pytest.raises(OptionError, match="this run has books, other"):
            call()
    counts = llm.engine.counts()
    assert counts.waiting == counts.running == 0
    with LLM(MODEL, protection="local") as bare, pytest.raises(OptionError, match=r"compute\.lora was not given"):
        bare.generate(PROMPT, PARAMS, lora="books")


def test_what_cannot_be_used_is_refused_before_a_worker_starts(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.api.parties.LocalWorker", None)
    other = write_adapter(tmp_path / "other", tiny_model("phi3"), targets=("o_proj",))
    (other / "adapter_config.json").write_text((paths["books"] / "adapter_config.json").read_text())
    for given, kind in (("/nowhere/at-all", CheckpointNotFound), (str(other), CorruptCheckpoint)):
        with pytest.raises(kind):
            LLM(MODEL, compute=ComputeConfig(lora=(given,)))


def test_the_digest_of_a_run_covers_its_adapters(paths: dict[str, Path]) -> None:
    config = open_checkpoint(MODEL).config
    books, law = (str(path) for path in paths.values())
    runs = [[], [books], [law], [books, law], [f"x={books}"]]
    digests = [load_adapters(run, config).run_digest("0" * 64) for run in runs]
    assert digests[0] == NO_ADAPTERS.run_digest("0" * 64) == "0" * 64
    assert len(set(digests)) == len(runs)
    assert load_adapters([law, books], config).run_digest("0" * 64) == digests[3]  # their order is no part of it
    assert load_adapters([books], config).run_digest("1" * 64) != digests[1]


def test_a_pinned_digest_is_that_of_model_and_adapters(paths: dict[str, Path]) -> None:
    with serve(MODEL) as (_, address):

        def digest(*lora: str, pin: str | None = None) -> str:
            guard, compute = GuardConfig(model_digest=pin), ComputeConfig(lora=lora)
            with LLM(MODEL, protection="verified", worker=address, guard=guard, compute=compute) as llm:
                assert llm.guard is not None
                assert llm.stats.as_dict()["model_digest"] == llm.guard.model_digest
                return llm.guard.model_digest

        plain, own = digest(), digest(str(paths["books"]))
        assert own == load_adapters([str(paths["books"])], open_checkpoint(MODEL).config).run_digest(plain)
        assert digest(str(paths["books"]), pin=own) == own
        for lora in ((), (str(paths["law"]),)):
            with pytest.raises(ModelMismatch, match="pinned"):
                digest(*lora, pin=own)
