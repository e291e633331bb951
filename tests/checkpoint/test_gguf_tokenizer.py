from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.gguf_tokenizer import text_format_from_gguf
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

from .makers import TEXTS, VOCAB, byte_level_fields, byte_level_tokenizer, write_gguf


def _read(path: Path, fields: dict[str, Any], arch: str = "llama") -> TextFormat:
    write_gguf(path / "vocabulary.gguf", arch=arch, tokenizer=fields)
    return text_format_from_gguf(GgufFile(path / "vocabulary.gguf"))


def _tokenizer(path: Path, fields: dict[str, Any], arch: str = "llama") -> Tokenizer:
    return Tokenizer.from_str(_read(path, fields, arch).tokenizer_json)


@pytest.mark.slow
def test_default_model_equals_transformers(default_gguf_file: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(default_gguf_file.parent, gguf_file=default_gguf_file.name)
    text = text_format_from_gguf(GgufFile(default_gguf_file))
    ours = Tokenizer.from_str(text.tokenizer_json)
    # transformers does not read tokenizer.ggml.pre, and so misses that SmolLM splits off every digit first.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    prose = (Path(__file__).parents[1] / "data" / "prose.txt").read_text(encoding="utf-8")[:20_000]
    for line in [*TEXTS, prose, Path(__file__).read_text(encoding="utf-8")]:
        ids = ours.encode(line).ids
        assert ids == theirs(line)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == line
    assert text.special_tokens["eos_token"] == theirs.eos_token == "<|im_end|>"
    assert text.eos_token_ids == (theirs.eos_token_id,)
    assert text.chat_template == theirs.chat_template


def test_byte_level_equals_the_tokenizer_it_was_written_from(tmp_path: Path) -> None:
    text = _read(tmp_path, byte_level_fields())
    ours, original = Tokenizer.from_str(text.tokenizer_json), byte_level_tokenizer()
    for line in TEXTS:
        assert ours.encode(line).ids == original.encode(line).ids
    assert text.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert text.eos_token_ids == (VOCAB - 1,)
    assert text.chat_template == "{{ messages[0]['content'] }}"
    assert text.tool_chat_template is None
    assert _read(tmp_path, byte_level_fields() | {"chat_template.tool_use": "tools"}).tool_chat_template == "tools"


@pytest.mark.parametrize(
    ("pre", "digits", "contraction"),
    [
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", "5"], ["I", "'", "LL"]),
        ("llama-bpe", ["a", "Ġ", "123", "45"], ["I", "'LL"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "5"], ["I", "'LL"]),
        ("gpt-2", ["a", "Ġ12345"], ["I", "'", "LL"]),
        (None, ["a", "Ġ12345"], ["I", "'", "LL"]),
    ],
)
def test_patterns(tmp_path: Path, pre: str | None, digits: list[str], contraction: list[str]) -> None:
    tokenizer = _tokenizer(tmp_path, {**byte_level_fields(), "pre": pre})

    def split(text: str) -> list[str]:
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert split("a 12345") == digits
    assert split("I'LL") == contraction


@pytest.mark.parametrize(
    ("pre", "settings", "expected"),
    [
        ("gpt-2", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
def test_begin_and_end(tmp_path: Path, pre: str, settings: dict[str, bool], expected: tuple[bool, bool]) -> None:
    tokenizer = _tokenizer(tmp_path, {**byte_level_fields(), "pre": pre, **settings})
    ids = tokenizer.encode("word").ids
    assert (ids[0] == VOCAB - 2, ids[-1] == VOCAB - 1) == expected
    assert ids[int(expected[0]) : len(ids) - int(expected[1])] == tokenizer.encode("word", add_special_tokens=False).ids


def test_user_defined_tokens_are_found_and_kept(tmp_path: Path) -> None:
    fields = byte_level_fields()
    fields["types"][-1] = 4
    tokenizer = _tokenizer(tmp_path, fields)
    assert tokenizer.encode("a<|im_end|>").ids[-1] == VOCAB - 1
    assert tokenizer.decode([VOCAB - 2, VOCAB - 1]) == "<|im_end|>"  # the control token is skipped, this one is not


@pytest.mark.parametrize(
    "name",
    [
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>"),
        *("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_a_turn_ends_where_the_name_of_a_token_says_so(tmp_path: Path, name: str) -> None:
    fields = byte_level_fields()
    fields["tokens"][-1], fields["eos_token_id"] = name, 3  # as converters do: the end of a text alone
    ends = {}
    for kind in (1, 2, 3, 4, 5):
        fields["types"][-1] = kind
        ends[kind] = _read(tmp_path, fields).eos_token_ids
    assert ends == {1: (3,), 2: (3,), 3: (3, VOCAB - 1), 4: (3, VOCAB - 1), 5: (3,)}


def test_the_token_of_unknown_characters_ends_an_answer_if_the_file_says_so(tmp_path: Path) -> None:
    """That of SmolLM is called ``<|endoftext|>``, and its turns end in ``<|im_end|>`` alone."""
    fields = byte_level_fields() | {"unknown_token_id": VOCAB - 2}
    fields["tokens"][-2] = "<|endoftext|>"
    assert _read(tmp_path, fields).eos_token_ids == (VOCAB - 1,)
    assert _read(tmp_path, fields | {"eot_token_id": VOCAB - 2}).eos_token_ids == (VOCAB - 1, VOCAB - 2)


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece BPE with Llama's settings."""
    prose = (Path(__file__).parents[1] / "data" / "prose.txt").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in prose.splitlines() if line] + TEXTS[1:5]),
        model_writer=model,
        vocab_size=1200,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _sentencepiece_fields(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    count = pieces.get_piece_size()

    def kind(i: int) -> int:
        return 2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [pieces.id_to_piece(i) for i in range(count)],
        "scores": [float(pieces.get_score(i)) for i in range(count)],
        "types": [kind(i) for i in range(count)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def test_sentencepiece_ids(tmp_path: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = _tokenizer(tmp_path, _sentencepiece_fields(pieces))
    prose = (Path(__file__).parents[1] / "data" / "prose.txt").read_text(encoding="utf-8")
    for line in [*TEXTS, *prose.splitlines()[:300], prose[:3000]]:
        if "<s>" in line:
            continue  # found as a special token here, plain text for SentencePiece
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        assert ids == pieces.encode(line), line
        assert tokenizer.decode(ids) == line
    assert tokenizer.encode("word").ids == [1, *pieces.encode("word")]
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == [2]


def test_sentencepiece_without_prefix(tmp_path: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = _tokenizer(tmp_path, {**_sentencepiece_fields(pieces), "add_space_prefix": False})
    ids = tokenizer.encode("the word", add_special_tokens=False).ids
    assert ids != pieces.encode("the word")
    assert tokenizer.decode(ids) == "the word"


def test_special_tokens_of_phi_3_take_the_white_space_behind_them(tmp_path: Path) -> None:
    """As in its own tokenizer.json, which GGUF has no keys for; its templates write a line feed behind each token."""
    bytes_ = [f"<0x{code:02X}>" for code in range(256)]
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>"]
    tokens = [*special, *bytes_, "▁", "h", "i", "▁h", "hi"]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "types": [2, 3, 4, 3, 3, 3, *[6] * 256, *[1] * 5],
        "scores": [-float(i) for i in range(len(tokens))],
        "bos_token_id": 1,
        "eos_token_id": 3,
        "unknown_token_id": 0,
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    text = "<|user|>\nhi<|end|> \n</s>\nhi<|endoftext|>\n<s> hi"
    plain, phi3 = (
        [tokens[i] for i in _tokenizer(tmp_path, fields, arch).encode(text).ids] for arch in ("llama", "phi3")
    )
    assert phi3 == ["<|user|>", "hi", "<|end|>", "</s>", "hi", "<|endoftext|>", "<0x0A>", "<s>", "▁h", "i"]
    assert plain.count("<0x0A>") == 4
    byte_level = _tokenizer(tmp_path, byte_level_fields(), "phi3")  # Phi-4's
    assert byte_level.encode("<|im_start|>\na").tokens == ["<|im_start|>", "Ċ", "a"]


def test_gemma4_merges_over_words_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokens = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "▁", "▁a", "ab", "b▁a"]
    fields = {
        "model": "gemma4",
        "tokens": tokens,
        "types": [2, 3, 3, *[6] * 256, *[1] * 6],
        "merges": ["b ▁a", "▁ a", "a b"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    tokenizer = _tokenizer(tmp_path, fields)
    assert tokenizer.encode("ab a").tokens == ["<bos>", "a", "b▁a"]  # no cut at the space
    assert tokenizer.encode(" ab", add_special_tokens=False).tokens == ["▁a", "b"]
    ids = tokenizer.encode("é<eos>", add_special_tokens=False).ids
    assert ids == [3 + 0xC3, 3 + 0xA9, 2]
    assert tokenizer.decode(tokenizer.encode(" ab é a").ids) == " ab é a"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "bert"}, "bert"),
        ({"model": "t5"}, "t5"),
        ({"model": "rwkv"}, "rwkv"),
        ({"pre": "kimi-k2"}, r"kimi-k2.*smollm.*llama-bpe.*qwen2.*falcon"),
        ({"model": "llama", "scores": [0.0] * VOCAB, "remove_extra_whitespaces": True}, "normaliser"),
    ],
)
def test_refuses_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        _read(tmp_path, {**byte_level_fields(), **change})


TOKENS = list(enumerate(byte_level_fields()["tokens"]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": None}, "tokens"),
        ({"merges": None}, "merges"),
        ({"merges": ["no such"]}, "merges"),
        ({"types": [1]}, "token types"),
        ({"types": ["one"] * VOCAB}, "token_type"),
        ({"tokens": ["twice"] * VOCAB}, "duplicates"),
        ({"tokens": list(range(VOCAB))}, "tokens"),
        ({"merges": [1, 2]}, "merges"),
        ({"model": "llama", "scores": ["best"] * VOCAB}, "scores"),
        ({"add_bos_token": True, "tokens": ["$A:1 x" if i == VOCAB - 2 else t for i, t in TOKENS]}, "BOS"),
        ({"eos_token_id": VOCAB}, "eos_token_id"),
        ({"model": "llama", "scores": [0.0]}, "scores"),
    ],
)
def test_inconsistent_vocabularies(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=named):
        _read(tmp_path, {**byte_level_fields(), **change})


def test_tokenizer_json_is_plain_json(tmp_path: Path) -> None:
    parsed = json.loads(_read(tmp_path, byte_level_fields()).tokenizer_json)
    assert parsed["model"]["type"] == "BPE"
    assert [token["content"] for token in parsed["added_tokens"]] == ["<|im_start|>", "<|im_end|>"]
