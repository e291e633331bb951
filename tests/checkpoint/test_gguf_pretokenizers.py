from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers.models.qwen2 import tokenization_qwen2
from transformers.models.qwen3_5 import tokenization_qwen3_5

from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.gguf_pretokenizers import BY_NAME, ROWS
from tsqp.checkpoint.gguf_tokenizer import text_format_from_gguf

from .makers import TEXTS, VOCAB, byte_level_fields, write_gguf

VOCABULARIES = "TSQP_GGUF_VOCABULARIES"

# By hand, from the patterns; | is a cut.
SPLITS = {
    "gpt-2": ["I|'|LL| we|'ll", " $|1234|.|50", "PyTorch| iPhone", "a| | b|\n\n| c", "=|f|();|\n", "e|\u0301|t"],
    "smollm": ["I|'|LL| we|'ll", " $|1|2|3|4|.|5|0", "PyTorch| iPhone", "a| | b|\n\n| c", "=|f|();|\n", "e|\u0301|t"],
    "llama-bpe": ["I|'LL| we|'ll", " $|123|4|.|50", "PyTorch| iPhone", "a| | b|\n\n| c", "=f|();\n", "e|\u0301t"],
    "qwen2": ["I|'LL| we|'ll", " $|1|2|3|4|.|5|0", "PyTorch| iPhone", "a| | b|\n\n| c", "=f|();\n", "e|\u0301t"],
    "qwen35": ["I|'LL| we|'ll", " $|1|2|3|4|.|5|0", "PyTorch| iPhone", "a| | b|\n\n| c", "=f|();\n", "e\u0301t"],
    "tekken": ["I|'LL| we|'ll", " $|1|2|3|4|.|5|0", "Py|Torch| i|Phone", "a| | b|\n\n| c", "=f|();\n", "e\u0301t"],
    "gpt-4o": ["I'LL| we'll", " $|123|4|.|50", "Py|Torch| i|Phone", "a| | b|\n\n| c", "=f|();\n", "e\u0301t"],
    "seed-coder": ["I|'LL| we|'ll", " $|1|2|3|4|.|5|0", "PyTorch| iPhone", "a| | b|\n\n| c", "=f|();|\n", "e|\u0301t"],
    "deepseek-llm": [
        "I|'|LL| we|'|ll",
        " $|1234|.|50",
        "PyTorch| iPhone",
        "a| | b|\n|\n| c",
        "=|f|();|\n",
        "e|\u0301|t",
    ],
    # A dollar is no punctuation for Unicode, and so stays with its space.
    "deepseek-coder": [
        "I|'|LL| we|'|ll",
        " $|1|2|3|4|.|5|0",
        "PyTorch| iPhone",
        "a| | b|\n|\n| c",
        "=|f|();|\n",
        "e|\u0301|t",
    ],
    "deepseek-v3": ["I|'LL| we|'ll", " $|123|4|.|50", "PyTorch| iPhone", "a| | b|\n\n| c", "=f|();\n", "e\u0301t"],
    "falcon": ["I|'|LL| we|'|ll", " |$|123|4|.|50", "PyTorch| iPhone", "a| | b|\n\n| c", "=|f|();|\n", "e|\u0301|t"],
}
SAME_PATTERNS = {
    "gpt-2": ["default", "phi-2", "mpt", "gpt-neox", "olmo"],
    "smollm": ["starcoder", "refact", "command-r"],
    "llama-bpe": ["llama3", "llama-v3", "smaug-bpe", "dbrx"],
    "qwen2": ["deepseek-r1-qwen"],
    "gpt-4o": ["llama4"],
}


def _tokenizer(path: Path, name: str) -> Tokenizer:
    write_gguf(path / "vocabulary.gguf", tokenizer={**byte_level_fields(), "pre": name})
    return Tokenizer.from_str(text_format_from_gguf(GgufFile(path / "vocabulary.gguf")).tokenizer_json)


def _pieces(tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenize_str(text)]


def _regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _of(name: str) -> pre_tokenizers.PreTokenizer:
    """What a row does to a text, without the letters of bytes."""
    return pre_tokenizers.Sequence(
        [_regex(pattern) for pattern in BY_NAME[name].patterns + BY_NAME[name].byte_patterns]
    )


@pytest.mark.parametrize("name", SPLITS)
def test_splits_by_hand(name: str) -> None:
    for other in [name, *SAME_PATTERNS.get(name, [])]:
        for cut in SPLITS[name]:
            assert _pieces(_of(other), cut.replace("|", "")) == cut.split("|"), other


def test_every_name_is_one_row_and_has_its_splits() -> None:
    assert sum(len(row.names) for row in ROWS) == len(BY_NAME)
    assert set(BY_NAME) == {*SPLITS, *(other for others in SAME_PATTERNS.values() for other in others)}


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
# What the models' own tokenizer.json are made of, where the library has a part for it or transformers the pattern.
THEIRS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [GPT2],
    "mpt": [GPT2],
    "starcoder": [DIGITS, GPT2],
    "command-r": [DIGITS, GPT2],
    "qwen2": [_regex(tokenization_qwen2.PRETOKENIZE_REGEX), BYTES],
    "qwen35": [_regex(tokenization_qwen3_5.PRETOKENIZE_REGEX), BYTES],
    "falcon": [
        pre_tokenizers.Punctuation(behavior="contiguous"),
        GPT2,
        pre_tokenizers.Digits(individual_digits=False),
        _regex("[0-9][0-9][0-9]"),
    ],
    "deepseek-coder": [
        _regex("[\r\n]"),
        _regex(r"\s?\p{L}+"),
        _regex(r"\s?\p{P}+"),
        _regex("[一-龥ࠀ-一가-퟿]+"),
        DIGITS,
        BYTES,
    ],
}


@pytest.mark.parametrize("name", THEIRS)
def test_splits_equal_those_of_the_library(tmp_path: Path, name: str) -> None:
    theirs = pre_tokenizers.Sequence(THEIRS[name])
    ours = _tokenizer(tmp_path, name).pre_tokenizer
    # The library's classes are of one version of Unicode, its patterns of another: of newer characters they disagree.
    old = st.characters(codec="utf-8", max_codepoint=0xFFFF).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
    letters = st.text(st.one_of(st.sampled_from("aZ'sé09 \t\r\n.$<`،一ㅎǅ²\u0301\u0378𝒳𝟗𐎟𠀀"), old), max_size=24)

    @settings(max_examples=150, deadline=None)
    @given(letters)
    def same(text: str) -> None:
        assert _pieces(ours, text) == _pieces(theirs, text)

    same()
    for text in TEXTS:
        assert _pieces(ours, text) == _pieces(theirs, text)


def test_deepseek_takes_most_letters_that_have_two_cases() -> None:
    def is_taken(letter: str) -> bool:
        return len(_pieces(_regex(BY_NAME["deepseek-llm"].patterns[1]), f"1{letter}1")) == 3

    assert all(is_taken(letter) for letter in "AZazµÀÖØöøǅΩωЖжԱԯἀῼℂⱥﬁＡｚ𐐀𞤀")
    assert not any(is_taken(letter) for letter in "@[`{ª×÷ƻǀʔʰաა𝐀一ا")
    for code in range(0x20, 0x2000):
        assert not is_taken(chr(code)) or unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt")


def test_a_sign_range_of_deepseek_reaches_over_ascii_letters() -> None:
    assert _pieces(_of("deepseek-llm"), "naïve") == ["na", "ï", "ve"]


@pytest.mark.parametrize("name", BY_NAME)
def test_composed_letters(tmp_path: Path, name: str) -> None:
    """The normaliser is that of the models' own tokenizers: tokens of decomposed letters are those of composed ones."""
    tokenizer = _tokenizer(tmp_path, name)
    same = tokenizer.encode("cafe\u0301").ids == tokenizer.encode("café").ids
    assert same == (name in {"command-r", "mpt", "gpt-neox", "olmo", "qwen2", "deepseek-r1-qwen", "qwen35"})


@pytest.mark.parametrize("name", BY_NAME)
def test_whole_words_and_begin(tmp_path: Path, name: str) -> None:
    fields = byte_level_fields()
    fields["tokens"].append("qzq")  # no merge makes it
    fields["types"].append(1)
    write_gguf(tmp_path / "vocabulary.gguf", tokenizer={**fields, "pre": name})
    text = text_format_from_gguf(GgufFile(tmp_path / "vocabulary.gguf"))
    ids = Tokenizer.from_str(text.tokenizer_json).encode("qzq").ids
    special = name in {"llama-bpe", "llama3", "llama-v3", "tekken"}
    assert (VOCAB in ids) == special
    assert (ids[0] == VOCAB - 2) == special


# llama.cpp does not normalise, and this answer is its own; transformers' tokenizer for Qwen 3.5 normalises, as ours.
ANSWERS_WITHOUT_NORMALISER = {"qwen35"}
CAUSAL = [
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt"),
    *("phi-3", "qwen2", "qwen35", "refact", "starcoder"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_real_vocabularies_of_llama_cpp(name: str) -> None:
    """Every text of ``ggml-vocab-NAME.gguf.inp`` has the tokens of ``.out``.

    The files are in the source package of llama-cpp-python, under vendor/llama.cpp/models.
    """
    if not (directory := os.environ.get(VOCABULARIES)):
        pytest.skip(f"{VOCABULARIES} does not name llama.cpp's directory of vocabularies")
    path = Path(directory) / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_str(text_format_from_gguf(GgufFile(path)).tokenizer_json)
    if name in ANSWERS_WITHOUT_NORMALISER:
        tokenizer.normalizer = None
    with Path(f"{path}.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    answers = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(texts) - 1 == len(answers) > 40  # the last separator ends the file
    for text, answer in zip(texts, answers, strict=False):
        assert tokenizer.encode(text, add_special_tokens=False).ids == answer, text
