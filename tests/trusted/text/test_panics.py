"""The tokenizers library panics at some files, and a panic is no Exception."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer

from tests.checkpoint.makers import byte_level_fields, write_gguf
from tests.commands import Result
from tests.families import byte_tokenizer, tiny_model
from tsqp.checkpoint import gguf_tokenizer
from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.tokenizers_library import call
from tsqp.errors import CorruptCheckpoint, PromptError
from tsqp.trusted.text.control import ControlTokens
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.trusted.text.traced import Traced

SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
PANICS: dict[str, dict[str, Any]] = {
    "when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fwAA"}},
    "at any text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAEAAAA="}},
    "at a special token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, SEQUENCE],
            "pair": [SEQUENCE, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        }
    },
    "at a merge": {
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": ["a b"],
            "continuing_subword_prefix": "ééé",
        },
    },
}


def changed(change: dict[str, Any]) -> str:
    return json.dumps(json.loads(byte_tokenizer().to_str()) | change)


@pytest.mark.parametrize("case", PANICS)
def test_a_tokenizer_that_panics_is_corrupt(case: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer cannot be (read|used): ") as refused:
        Tokenizer(TextFormat(changed(PANICS[case]), ()))
    assert "\n" not in str(refused.value)
    assert (refused.value.__cause__, refused.value.__context__) == (None, None)


@pytest.mark.parametrize("case", PANICS)
def test_model_check_says_so_in_one_line(case: str, tmp_path: Path, tsqp: Any) -> None:
    for file in tiny_model("llama").directory.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text(changed(PANICS[case]))
    result: Result = tsqp("model", "check", tmp_path)
    assert result.code == 1
    assert result.out.splitlines()[-1].startswith("refused: the checkpoint's tokenizer cannot be ")


def test_a_vocabulary_that_lacks_characters_is_taken() -> None:
    words = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}
    tokenizer = Tokenizer(TextFormat(changed({"model": words, "pre_tokenizer": None}), ()))
    assert tokenizer.encode("aa") == [0, 0]
    with pytest.raises(PromptError, match="cannot encode the text"):
        tokenizer.encode("my secret")


class Panic(BaseException):
    """As the library's: no Exception."""


class Panicking:
    """A tokenizer that panics at every text, and tells what the text was."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **_: object) -> None:
        raise Panic(f"byte index 3 is not a char boundary of `{text}`")


def test_no_error_holds_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(TextFormat(byte_tokenizer().to_str(), (), "{{ messages[0].content }}"))
    broken: Any = Panicking(byte_tokenizer())
    monkeypatch.setattr(tokenizer, "_tokenizer", broken)
    control = ControlTokens(broken)
    calls: list[Callable[[], object]] = [
        lambda: tokenizer.encode("my secret"),
        lambda: tokenizer.has_more_tokens("my secret" * 20_000, 5),
        lambda: control.encode(Traced("my secret"), special_tokens=True),
    ]
    for encode in calls:
        with pytest.raises(PromptError) as refused:
            encode()
        error = refused.value
        assert (error.__cause__, error.__context__) == (None, None)
        assert "my secret" not in "".join(traceback.format_exception_only(error))


def test_a_panic_over_aliases_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = byte_tokenizer()
    fast.add_special_tokens(["<|im_end|>"])
    control = ControlTokens(fast)
    assert control.encode(Traced("my <|im_end|>"), special_tokens=False)
    assert control._aliased is not None
    monkeypatch.setattr(control._aliased, "_tokenizer", Panicking(fast))
    with pytest.raises(PromptError) as refused:
        control.encode(Traced("my secret <|im_end|>"), special_tokens=False)
    assert (refused.value.__cause__, refused.value.__context__) == (None, None)


def test_a_gguf_vocabulary_that_panics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(**_: object) -> None:
        raise Panic("no entry found\nfor key")

    write_gguf(tmp_path / "m.gguf", tokenizer=byte_level_fields())
    monkeypatch.setattr(gguf_tokenizer, "BPE", panic)
    with pytest.raises(CorruptCheckpoint, match="do not agree: no entry found for key"):
        gguf_tokenizer.text_format_from_gguf(GgufFile(tmp_path / "m.gguf"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_an_interrupt_is_no_panic(kind: type[BaseException]) -> None:
    def interrupted() -> None:
        raise kind

    with pytest.raises(kind):
        call(interrupted, PromptError)
