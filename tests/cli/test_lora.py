"""``--lora`` on the command line: who answers, what is told, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import merged, write_adapter
from tests.commands import Result
from tests.families import byte_tokenizer, tiny_model
from tsqp.api.adapters import load_adapters
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.adapter import Adapter

LLAMA = tiny_model("llama")
RUN = ("--model", str(LLAMA.directory), "--protection", "local", "--dtype", "float32", "--threads", "1")
SHORT = ("-n", "6", "--temperature", "0", "--ignore-eos", "--json")
Command = Callable[..., Result]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "books", LLAMA)


def test_generate_answers_by_the_adapter_that_it_is_given(tsqp: Command, adapter: Path) -> None:
    tokens = byte_tokenizer().encode("hello").ids
    plain, own = (tsqp("generate", "-", *RUN, *SHORT, *lora, stdin="hello") for lora in ((), ("--lora", adapter)))
    assert plain.json["token_ids"] == LLAMA.greedy(tokens, 6)
    assert own.json["token_ids"] == merged(LLAMA, adapter).greedy(tokens, 6)
    assert plain.json["lora"] is None
    assert own.json["lora"] == {"name": "books", "sha256": Adapter(adapter).digest}
    assert f"adapter books: sha256 {Adapter(adapter).digest}" in own.err
    assert "adapter" not in plain.err


def test_a_perplexity_is_that_of_the_adapter(tsqp: Command, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times.")
    found = [
        tsqp("eval", "perplexity", "--text", tmp_path / "text", *RUN, "--json", *lora).json
        for lora in ((), ("--lora", f"x={adapter}"))
    ]
    assert [one["lora"] for one in found] == [None, "x"]
    assert found[0]["perplexity"] != found[1]["perplexity"]


def test_the_variable_holds_several(tsqp: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_LORA", f"a={adapter}")
    assert tsqp("generate", "-", *RUN, *SHORT, stdin="hello").json["lora"]["name"] == "a"
    monkeypatch.setenv("TSQP_LORA", f"a={adapter} b={adapter}")
    assert "give --lora once" in tsqp("generate", "-", *RUN, *SHORT, stdin="hello").error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "hi", *RUN, "--lora", "a=/x", "--lora", "b=/x"), "give --lora once"),
        (("chat", *RUN, "--lora", "a=/x", "--lora", "b=/x"), "give --lora once"),
        (("generate", "hi", *RUN, "--lora", "a=/x", "--lora", "a=/y"), "--lora names a twice"),
        (("generate", "hi", *RUN, "--lora", "a b=/x"), "--lora takes [NAME=]PATH"),
        (("generate", "hi", *RUN, "--lora", "/nowhere/at-all"), "/nowhere/at-all has no adapter_config.json"),
        (("audit", "hi", *RUN[:2], "--lora", "/nowhere/at-all"), "/nowhere/at-all has no adapter_config.json"),
        (("bench", "decode", "--lora", "/x"), "leave out --lora"),
        (("bench", "prefill", "--lora", "/x"), "leave out --lora"),
        (("bench", "all", "--lora", "/x"), "leave out --lora"),
        (("model", "info", str(LLAMA.directory), "--lora", "/x"), "--lora is for --digest"),
        (
            ("serve", *RUN, "--lora", "a=/x", "--served-model-name", "m", "--served-model-name", "m:a"),
            "--served-model-name m:a is the name of the adapter a",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_refused(tsqp: Command, arguments: tuple[str, ...], named: str) -> None:
    result = tsqp(*arguments)
    assert result.code != 0
    assert named in result.error


def test_info_of_an_adapter(tsqp: Command, adapter: Path) -> None:
    found = tsqp("model", "info", adapter, "--json").json
    assert found == {
        "adapter": str(adapter),
        "base_model": "tiny",
        "ranks": [4],
        "scales": [2.0],
        "targets": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "layers": [0, 1],
        "parameters": Adapter(adapter).parameters,
        "sha256": Adapter(adapter).digest,
    }
    assert f"sha256               {Adapter(adapter).digest}" in tsqp("model", "info", adapter).out
    assert "--digest is for models" in tsqp("model", "info", adapter, "--digest").error


def test_info_shows_the_digest_of_a_run_with_adapters(tsqp: Command, adapter: Path) -> None:
    digests = [
        json.loads(tsqp("model", "info", LLAMA.directory, "--digest", "--json", *lora).out)["model_digest"]
        for lora in ((), ("--lora", f"a={adapter}"))
    ]
    adapters = load_adapters([f"a={adapter}"], open_checkpoint(str(LLAMA.directory)).config)
    assert digests[1] == adapters.run_digest(digests[0]) != digests[0]
