"""What the names in ``tokenizer.ggml.pre`` mean: how byte-level BPE splits a text before it merges.

A pre-tokenizer is a row of ``ROWS``. GGUF stores its name alone; the patterns are those of the models' own
``tokenizer.json``, which the names were made for, and so is the normaliser, which llama.cpp leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

# Files from before the key existed were made for GPT-2's pattern, and so are taken for it.
NO_PATTERN_NAMED = "default"


@dataclass(frozen=True)
class PreTokenizer:
    """One row.

    ``patterns`` are regular expressions of Oniguruma, applied in turn: each splits every piece of the one before into
    its matches and what lies between them. ``byte_patterns`` come after them, where every byte is a letter already (of
    which ``²``, ``³``, ``¹``, ``¼``, ``½`` and ``¾`` are numbers). ``nfc``: the text is brought to Unicode's form C
    first. ``whole_words``: a piece that is a token is taken whole, whatever the merges make of it. ``begins``: BOS is
    put before a text when the file does not say.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    byte_patterns: tuple[str, ...] = ()
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


def _class_of(ranges: str) -> str:
    """``"41-5A B5"`` → the inside of a character class with these code points."""
    ends = (part.partition("-") for part in ranges.split())
    return "".join(rf"\x{{{first}}}-\x{{{last or first}}}" for first, _, last in ends)


_DIGIT = r"\p{N}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # of English words, in either case
_SPACES = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"

# Words with one leading sign, then digits, other signs and white space. Llama 3 takes digits by three, Qwen one by one.
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Qwen 3.5 leaves marks with their letters.
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
_SEED = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"

# Words are cut where a capital follows a small letter; GPT-4o leaves endings with their words.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS}"
_GPT4O = rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SIGNS}"

_LINE_END = r"[\r\n]"
_CHINESE_OR_KOREAN = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
# Most letters that have two cases, but not all: neither small Armenian nor Georgian ones, nor those of mathematics.
_DEEPSEEK_LETTERS = _class_of(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1"
    " 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A"
    " 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4"
    " 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128"
    " 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D"
    " A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3"
    " 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_SIGNS = _class_of("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_DEEPSEEK_LLM = (
    _LINE_END,
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    rf"\s?[{_DEEPSEEK_SIGNS}]+",
    r"\s+$",
    _CHINESE_OR_KOREAN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (_LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_OR_KOREAN, _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES,
)
_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT2)
_FALCON_BYTES = (r"\p{N}+", r"[0-9][0-9][0-9]")

ROWS = (
    PreTokenizer(("gpt-2", NO_PATTERN_NAMED, "phi-2"), (_GPT2,)),
    PreTokenizer(("smollm", "starcoder", "refact"), (_DIGIT, _GPT2)),
    PreTokenizer(("command-r",), (_DIGIT, _GPT2), nfc=True),
    PreTokenizer(("mpt", "gpt-neox", "olmo"), (_GPT2,), nfc=True),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3,), whole_words=True, begins=True),
    PreTokenizer(("smaug-bpe", "dbrx"), (_LLAMA3,)),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), (_QWEN2,), nfc=True),
    PreTokenizer(("qwen35",), (_QWEN35,), nfc=True),
    PreTokenizer(("tekken",), (_TEKKEN,), whole_words=True, begins=True),
    PreTokenizer(("gpt-4o", "llama4"), (_GPT4O,)),
    PreTokenizer(("seed-coder",), (_SEED,)),
    PreTokenizer(("deepseek-llm",), _DEEPSEEK_LLM),
    PreTokenizer(("deepseek-coder",), _DEEPSEEK_CODER),
    PreTokenizer(("deepseek-v3",), _DEEPSEEK_V3),
    PreTokenizer(("falcon",), _FALCON, _FALCON_BYTES),
)
BY_NAME = {name: row for row in ROWS for name in row.names}
