"""The vocabulary of a GGUF file as the text of a ``tokenizer.json``.

Three kinds are implemented. ``gpt2`` is byte-level BPE with its merges in the file; GGUF only names the patterns
that split text beforehand, so the known ones are rows of ``gguf_pretokenizers``. ``llama`` is SentencePiece's BPE with
byte fallback: it merges the neighbours whose piece scores highest, and so the merges follow from the scores.
``gemma4`` is the same alphabet with the merges in the file.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.gguf_pretokenizers import BY_NAME, NO_PATTERN_NAMED, PreTokenizer
from tsqp.checkpoint.tokenizers_library import call
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tsqp.checkpoint.gguf_file import GgufFile

Merges = list[tuple[str, str]]

_SPACE = "▁"  # how SentencePiece writes a space

_SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_END_KEYS = ("eos", "eot", "eom")
_END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>"),
        *("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
    )
)
_KEEPING = ("<unk>", "<s>", "<|endoftext|>")  # tokens of Phi-3 that leave the white space behind them
_NO_TOKEN = 0xFFFF_FFFF


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``, as GGUF numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def text_format_from_gguf(file: GgufFile) -> TextFormat:
    """Raises UnsupportedModel for another kind of vocabulary, by name, CorruptCheckpoint for an inconsistent one."""
    kind = file.text("tokenizer.ggml.model")
    tokens: list[str] = file.array("tokenizer.ggml.tokens", str)
    types = _token_types(file, tokens)
    match kind:
        case "gpt2":
            tokenizer = _byte_level(file, tokens)
        case "llama":
            tokenizer = _sentencepiece(file, tokens, types)
        case "gemma4":
            tokenizer = _gemma4(file, tokens)
        case _:
            raise UnsupportedModel(
                f"{file.path}: tokenizer {kind!r} is not implemented; supported are gpt2, llama, gemma4"
            )
    strips = kind == "llama" and file.text("general.architecture", "") == "phi3"
    _add_special_tokens(tokenizer, tokens, types, strips=strips)
    _add_begin_and_end(tokenizer, file, tokens, kind)
    special = {name: _special_id(file, key, tokens) for name, key in _SPECIAL_KEYS.items()}
    return TextFormat(
        tokenizer_json=tokenizer.to_str(),
        eos_token_ids=_ends(file, tokens, types),
        chat_template=file.text("tokenizer.chat_template", "") or None,
        tool_chat_template=file.text("tokenizer.chat_template.tool_use", "") or None,
        special_tokens={name: tokens[i] for name, i in special.items() if i is not None},
    )


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    row = _pre_tokenizer(file)
    tokenizer = _tokenizer(file, tokens, _stored_merges(file), ignore_merges=row.whole_words)
    if row.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *_splits(row.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            *_splits(row.byte_patterns),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splits(patterns: tuple[str, ...]) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _stored_merges(file: GgufFile) -> Merges:
    merges = []
    for merge in file.array("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")  # a token has no space of its own: it is written Ġ or ▁
        merges.append((left, right))
    return merges


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    if file.has("tokenizer.ggml.precompiled_charsmap") or file.flag("tokenizer.ggml.remove_extra_whitespaces", False):
        raise UnsupportedModel(f"{file.path}: a SentencePiece vocabulary with its own normaliser is not implemented")
    scores = [float(score) for score in file.array("tokenizer.ggml.scores", (int, float))]
    if len(scores) != len(tokens):
        raise CorruptCheckpoint(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens")
    unknown = _special_id(file, "unknown", tokens)
    tokenizer = _tokenizer(
        file,
        tokens,
        merges_from_scores(tokens, scores, types),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _gemma4(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece's alphabet and byte fallback, with merges as in byte-level BPE and nothing split beforehand."""
    unknown = _special_id(file, "unknown", tokens)
    tokenizer = _tokenizer(
        file,
        tokens,
        _stored_merges(file),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> Merges:
    """Every way to make a normal piece from two, the best score first; of one piece, the longer left part first.

    Control, byte and user-defined tokens take no part: SentencePiece never makes them by merging.
    """
    normal = {token: i for i, token in enumerate(tokens) if types[i] == TokenType.NORMAL}
    found: list[tuple[float, int, str, str]] = []
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                found.append((-scores[i], -cut, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _tokenizer(file: GgufFile, tokens: list[str], merges: Merges, **options: Any) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):  # the library would panic
        raise CorruptCheckpoint(f"{file.path}: {len(tokens) - len(vocabulary)} tokens of the vocabulary are duplicates")
    return call(
        lambda: Tokenizer(BPE(vocab=vocabulary, merges=merges, **options)),
        lambda told: CorruptCheckpoint(f"{file.path}: the vocabulary and its merges do not agree: {told}"),
    )


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.text("tokenizer.ggml.pre", NO_PATTERN_NAMED)
    if name not in BY_NAME:
        supported = ", ".join(BY_NAME)
        raise UnsupportedModel(f"{file.path}: pre-tokenizer {name!r} is not implemented; supported are {supported}")
    return BY_NAME[name]


def _token_types(file: GgufFile, tokens: list[str]) -> list[int]:
    if not file.has("tokenizer.ggml.token_type"):
        return [TokenType.NORMAL] * len(tokens)
    types: list[int] = file.array("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise CorruptCheckpoint(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    return types


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], *, strips: bool) -> None:
    """Tokens that are found in the text before anything else; they keep the ids that they have in the vocabulary.

    ``strips``: they take the white space behind them, but for ``_KEEPING``. GGUF has no key for it.
    """
    added = [
        AddedToken(
            token,
            special=kind != TokenType.USER_DEFINED,
            normalized=False,
            rstrip=strips and token not in _KEEPING,
        )
        for token, kind in zip(tokens, types, strict=True)
        if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])


def _add_begin_and_end(tokenizer: Tokenizer, file: GgufFile, tokens: list[str], kind: str) -> None:
    """Honour add_bos_token and add_eos_token. Absent, they mean what llama.cpp takes them to mean."""
    begins = kind in ("llama", "gemma4") or (kind == "gpt2" and _pre_tokenizer(file).begins)
    bos = _special_id(file, "bos", tokens) if file.flag("tokenizer.ggml.add_bos_token", begins) else None
    eos = _special_id(file, "eos", tokens) if file.flag("tokenizer.ggml.add_eos_token", False) else None
    before = [] if bos is None else [tokens[bos]]
    after = [] if eos is None else [tokens[eos]]
    steps: list[processors.PostProcessor] = []
    if kind == "gpt2":
        steps.append(processors.ByteLevel(trim_offsets=False))
    if before or after:
        try:
            around = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
                special_tokens=[(tokens[i], i) for i in (bos, eos) if i is not None],
            )
        except ValueError as error:  # a token that reads like a place in the template
            raise CorruptCheckpoint(f"{file.path}: BOS or EOS cannot be put around a text: {error}") from error
        steps.append(around)
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)


def _ends(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[int, ...]:
    """The tokens that end an answer: those that the file names, and then those whose own name says so.

    A converter often writes the end of a text alone (Gemma 3, Phi-3), and a turn of a chat ends in another token. So
    names count for llama.cpp too. The token of unknown characters counts by its key alone: SmolLM's is called
    ``<|endoftext|>``.
    """
    named = [_special_id(file, key, tokens) for key in _END_KEYS]
    unknown = _special_id(file, "unknown", tokens)
    called = [
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token in _END_NAMES and kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and i != unknown
    ]
    return tuple(dict.fromkeys(i for i in (*named, *called) if i is not None))


def _special_id(file: GgufFile, key: str, tokens: list[str]) -> int | None:
    """A special token's id, or None when the file names none."""
    key = f"tokenizer.ggml.{key}_token_id"
    value = file.integer(key, _NO_TOKEN)
    if value == _NO_TOKEN:
        return None
    if not 0 <= value < len(tokens):
        raise CorruptCheckpoint(f"{file.path}: {key} is {value}, but there are {len(tokens)} tokens")
    return value
