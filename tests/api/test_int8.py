"""int8 and --compile as a user asks for them: real processes, and refusals by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Home, Result
from tests.families import tiny_model
from tsqp.errors import OptionError
from tsqp.untrusted.toolchain import check_compiler

OPEN = ("--protection", "open")
TINY = ("--model", "synthetic:tiny", *OPEN, "--max-tokens", "6", "--json")


@pytest.mark.slow
def test_int8_end_to_end_over_a_worker_that_is_started(home: Home) -> None:
    done = home.run("generate", "hello", *TINY, "--dtype", "int8", "--wire-dtype", "int8")
    assert done.code == 0, done.err
    assert (done.json["dtype"], done.json["wire_dtype"]) == ("int8", "int8")
    assert len(done.json["token_ids"]) == 6
    assert "in int8 over" in done.err
    assert "bfloat16, wire int8" in done.err  # what this side computes in, and what crosses


@pytest.mark.slow
def test_a_standing_int8_worker_over_ipc(home: Home) -> None:
    model = str(tiny_model("llama").directory)
    asked = ("generate", "hello", "--model", model, *OPEN, "--max-tokens", "6", "--json", "--dtype", "int8")
    listen = f"ipc://{home.runtime}/worker.sock"
    with home.worker("--model", model, "--dtype", "int8", "--listen", listen) as (_, address):
        done = home.run(*asked, "--worker", address)
    assert done.code == 0, done.err
    assert len(done.json["token_ids"]) == 6
    assert (done.json["transport"], done.json["dtype"]) == ("ipc", "int8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compile", "--protection", "local"), ("--compile", "local")),
        (("--compile", *OPEN, "--worker", "ipc:///tmp/nobody.sock"), ("--compile",)),
        (("--dtype", "int4"), ("int4",)),
        (("--wire-dtype", "int4", *OPEN), ("int4",)),
    ],
)
def test_what_does_not_go_together_is_refused(
    tsqp: Callable[..., Result], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = tsqp("generate", "hello", "--model", "synthetic:tiny", *arguments)
    assert done.code == 2
    assert all(word in done.error for word in words)


def test_compile_without_a_compiler_is_refused_before_any_weight_is_read(home: Home, tmp_path: Path) -> None:
    # The model does not exist: the compiler is looked for first.
    done = home.run("worker", "--model", str(tmp_path / "none"), "--compile", PATH=str(tmp_path))
    assert done.code == 2
    assert "g++" in done.error
    done = home.run("generate", "hello", *TINY, "--compile", PATH=str(tmp_path))
    assert done.code == 1
    assert "--compile needs a C++ compiler" in done.error


def test_compile_on_cuda_wants_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.untrusted.toolchain.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("tsqp.untrusted.toolchain.importlib.util.find_spec", lambda name: None)
    check_compiler("cpu")
    with pytest.raises(OptionError, match="triton"):
        check_compiler("cuda:0")


def test_compiled_code_of_others_is_not_loaded(home: Home, tmp_path: Path) -> None:
    (tmp_path / "compiled-worker").mkdir()
    (tmp_path / "compiled-worker").chmod(0o770)
    done = home.run("worker", "--model", "synthetic:tiny", "--compile", TSQP_CACHE=str(tmp_path))
    assert done.code == 1
    assert f"{tmp_path}/compiled-worker is open to others (mode 770); remove it" in done.error
    assert "TSQP_CACHE" in done.error


@pytest.mark.slow
def test_compiled_int8_gives_the_same_tokens(home: Home, tmp_path: Path) -> None:
    """With the scrubbed environment of a worker that is started, and nothing compiled before."""
    plain = home.run("generate", "hello", *TINY, "--dtype", "int8")
    compiled = home.run("generate", "hello", *TINY, "--dtype", "int8", "--compile", TSQP_CACHE=str(tmp_path))
    assert compiled.code == 0, compiled.err
    assert compiled.json["token_ids"] == plain.json["token_ids"]
    code = tmp_path / "compiled-worker"
    assert code.stat().st_uid == os.getuid()
    assert any(code.rglob("*.so"))


@pytest.mark.slow
def test_perplexity_of_a_text(home: Home, tsqp: Callable[..., Result], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    asked = ("eval", "perplexity", "--text", str(text), "--model", "synthetic:tiny", "--window", "40", "--stride", "13")
    local = tsqp(*asked, "--protection", "local", "--dtype", "float32", "--json")
    split = home.run(*asked, *OPEN, "--dtype", "int8", "--json")
    assert local.code == split.code == 0, local.err + split.err
    assert local.json["tokens"] == split.json["tokens"] == 45 * 4 - 1
    assert split.json["perplexity"] == pytest.approx(local.json["perplexity"], rel=0.1)
    assert (split.json["dtype"], split.json["partition"], local.json["partition"]) == ("int8", "linear", None)
    assert "perplexity" in tsqp(*asked, "--protection", "local").out


@pytest.mark.parametrize("arguments", [("--window", "1"), ("--stride", "0"), ("--stride", "1024"), ("--tokens", "1")])
def test_windows_that_leave_tokens_out_are_refused(
    tsqp: Callable[..., Result], tmp_path: Path, arguments: tuple[str, str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello there", encoding="utf-8")
    done = tsqp("eval", "perplexity", "--text", text, "--model", "synthetic:tiny", "--protection", "local", *arguments)
    assert done.code == 2
    assert done.error


def test_a_text_that_cannot_be_read_is_refused(tsqp: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    for name, words in (("none", "cannot read"), ("bytes", "UTF-8")):
        done = tsqp("eval", "perplexity", "--text", tmp_path / name)
        assert done.code == 2
        assert words in done.error
