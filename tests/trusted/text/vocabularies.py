"""Small vocabularies of every kind, each with control tokens, as a checkpoint would bring them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.checkpoint.makers import byte_level_fields, write_gguf
from tests.families import byte_tokenizer
from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.gguf_tokenizer import text_format_from_gguf
from tsqp.trusted.text.tokenizer import Tokenizer as TsqpTokenizer

CONTROLS = ("<|im_start|>", "<|im_end|>", "</s>", "<tool_response>")
LETTERS = [chr(code) for code in range(33, 127)]


def _added(tokenizer: Tokenizer, **flags: Any) -> TextFormat:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, **flags) for token in CONTROLS[:3]])
    tokenizer.add_tokens([AddedToken(CONTROLS[3], normalized=False, **flags)])  # controls where a template writes it
    return TextFormat(tokenizer.to_str(), (), special_tokens={"eos_token": "</s>"})


def _gguf(fields: dict[str, Any]) -> TextFormat:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(path, tokenizer=fields)
        return text_format_from_gguf(GgufFile(path))


def _gguf_byte_level() -> TextFormat:
    fields = byte_level_fields()
    fields["tokens"] += ["</s>", "<tool_response>"]
    fields["types"] += [3, 4]
    return _gguf(fields)


def _gguf_sentencepiece() -> TextFormat:
    bytes_ = [f"<0x{code:02X}>" for code in range(256)]
    pieces = [*LETTERS, "▁", "▁a", "im", "</", "</s", "s>"]
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_response>", *bytes_, *pieces]
    types = [2, 3, 3, 3, 3, 4, *[6] * 256, *[1] * len(pieces)]
    return _gguf(
        {
            "model": "llama",
            "tokens": tokens,
            "types": types,
            "scores": [-float(at) for at in range(len(tokens))],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
    )


def _merged() -> TextFormat:
    """Its merges make ``</s>`` of the letters, and words are looked up whole before they are merged."""
    vocabulary = {piece: at for at, piece in enumerate(["<unk>", "</s>", *LETTERS, "</", "s>", "▁"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>"])
    return _added(tokenizer)


def _unigram() -> TextFormat:
    """``</s>`` is its likeliest piece."""
    pieces = [("<unk>", -20.0), ("</s>", 0.0), *((letter, -5.0) for letter in LETTERS), ("▁", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(["<unk>"])
    return _added(tokenizer)


def _lowercase() -> TextFormat:
    """Its control tokens are looked for after the text is in lower case."""
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken(token, normalized=True) for token in CONTROLS])
    return TextFormat(tokenizer.to_str(), (), special_tokens={"eos_token": "</s>"})


BYTE_LEVEL, SINGLE_WORDS = "byte-level", "byte-level, single words"
VOCABULARIES: dict[str, TextFormat] = {
    BYTE_LEVEL: _added(byte_tokenizer()),
    "byte-level, lstrip": _added(byte_tokenizer(), lstrip=True),
    "byte-level, rstrip": _added(byte_tokenizer(), rstrip=True),
    "byte-level, lstrip and rstrip": _added(byte_tokenizer(), lstrip=True, rstrip=True),
    SINGLE_WORDS: _added(byte_tokenizer(), single_word=True),
    "lower case": _lowercase(),
    "merges that make a control token": _merged(),
    "unigram": _unigram(),
    "GGUF, byte-level": _gguf_byte_level(),
    "GGUF, SentencePiece": _gguf_sentencepiece(),
}


def cut_at_a_space(tokenizer: TsqpTokenizer) -> tuple[list[int], list[int]]:
    """The tokens of ``ab``, and those that go on with `` c``, which begin with a space in every vocabulary."""
    before, whole = (tokenizer.encode(text, special_tokens=False) for text in ("ab", "ab c"))
    return before, whole[len(before) :]
