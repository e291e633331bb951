"""Models with the shape of a known one and seeded random weights, for benchmarks and tests.

A tensor depends on the model's name and its own name alone, so each side makes only the tensors that it needs. The
bits come from NumPy's SFC64 through ``random_raw``, whose stream is the same on every machine and in every version.
Every value is a bfloat16, and holds in float16 and float32 as well, so all dtypes compute with the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.fingerprint import config_json
from tsqp.config.model import ModelConfig, RopeConfig
from tsqp.errors import CheckpointNotFound

if TYPE_CHECKING:
    import torch

GENERATOR_VERSION = 1
BLOCK_NUMBERS = 1 << 21  # that are made together


def _llama(
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    positions: int,
    rope: RopeConfig,
    tied: bool,
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=hidden // heads[0],
        vocab_size=vocab,
        max_positions=positions,
        rms_norm_eps=1e-5,
        rope=rope,
        windows=(None,) * layers,
        tied_embeddings=tied,
    )


SHAPES: dict[str, ModelConfig] = {
    "llama-3.2-1b": _llama(
        hidden=2048,
        inner=8192,
        layers=16,
        heads=(32, 8),
        vocab=128_256,
        positions=131_072,
        rope=RopeConfig(500_000.0, "llama3", factor=32.0),
        tied=True,
    ),
    "llama-3.2-1b-4-layers": _llama(  # for measuring: as wide as the one above, and soon ready
        hidden=2048,
        inner=8192,
        layers=4,
        heads=(32, 8),
        vocab=16_384,
        positions=131_072,
        rope=RopeConfig(500_000.0, "llama3", factor=32.0),
        tied=True,
    ),
    "llama-3.1-8b": _llama(
        hidden=4096,
        inner=14_336,
        layers=32,
        heads=(32, 8),
        vocab=128_256,
        positions=131_072,
        rope=RopeConfig(500_000.0, "llama3", factor=8.0),
        tied=False,
    ),
    "llama-3.1-70b": _llama(
        hidden=8192,
        inner=28_672,
        layers=80,
        heads=(64, 8),
        vocab=128_256,
        positions=131_072,
        rope=RopeConfig(500_000.0, "llama3", factor=8.0),
        tied=False,
    ),
    "llama-3.1-405b": _llama(
        hidden=16_384,
        inner=53_248,
        layers=126,
        heads=(128, 8),
        vocab=128_256,
        positions=131_072,
        rope=RopeConfig(500_000.0, "llama3", factor=8.0),
        tied=False,
    ),
    "tinyllama-1.1b": _llama(
        hidden=2048,
        inner=5632,
        layers=22,
        heads=(32, 4),
        vocab=32_000,
        positions=2048,
        rope=RopeConfig(10_000.0),
        tied=False,
    ),
    "smollm2-135m": _llama(
        hidden=576,
        inner=1536,
        layers=30,
        heads=(9, 3),
        vocab=49_152,
        positions=8192,
        rope=RopeConfig(100_000.0),
        tied=True,
    ),
    "tiny": _llama(
        hidden=64,
        inner=128,
        layers=2,
        heads=(4, 2),
        vocab=512,
        positions=2048,
        rope=RopeConfig(10_000.0),
        tied=True,
    ),
}


class SyntheticCheckpoint(Checkpoint):
    """``synthetic:NAME``; the name's case does not matter. Raises CheckpointNotFound, with the known names."""

    def __init__(self, model: str) -> None:
        self._shape_name = model.removeprefix("synthetic:").lower()
        if self._shape_name not in SHAPES:
            raise CheckpointNotFound(f"no synthetic model {model!r}; there are {', '.join(SHAPES)}")
        super().__init__(SHAPES[self._shape_name], model)

    def _read(self, name: str) -> torch.Tensor:
        """Made anew at every call, bfloat16: ones for a norm, random values for a matrix."""
        import torch

        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return _tensor(self._values(name).take(math.prod(shape)), shape[1])

    def _read_blocks(self, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        shape = self.shapes[name]
        if len(shape) == 1:
            yield first, self._read(name)[first:end]
            return
        values, inputs = self._values(name), shape[1]
        values.skip(first * inputs)
        step = max(1, BLOCK_NUMBERS // inputs)
        for begin in range(first, end, step):
            rows = min(step, end - begin)
            yield begin, _tensor(values.take(rows * inputs), inputs)

    def _values(self, name: str) -> _RandomBfloat16:
        seed = hashlib.sha256(f"{GENERATOR_VERSION}/{self._shape_name}/{name}".encode()).digest()
        return _RandomBfloat16(int.from_bytes(seed[:16], "little"), fan_in=self.shapes[name][1])

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.bfloat16

    def fingerprint(self) -> str:
        made_from = f"synthetic {GENERATOR_VERSION} {self._shape_name} ".encode()
        return hashlib.sha256(made_from + config_json(self.config)).hexdigest()

    def text_format(self) -> TextFormat:
        """Bytes as tokens: ids 0 to 255. Larger ids decode to nothing, and nothing ends a generation."""
        return TextFormat(tokenizer_json=_byte_tokenizer_json(), eos_token_ids=())


class _RandomBfloat16:
    """Bit patterns of bfloat16 values around zero with a standard deviation near fan_in^-½, one after another.

    Four values to a random word. Each keeps its sign, its 7 mantissa bits and the 2 low bits of its exponent; the
    exponent's base is added. So magnitudes spread over four octaves from 2^e, with root mean square 7.04 · 2^e:
    E[m²] = 7/3 for a mantissa in [1, 2), times (1 + 4 + 16 + 64)/4 over the octaves.
    """

    _kept_bits = np.uint64(0x81FF_81FF_81FF_81FF)

    def __init__(self, seed: int, fan_in: int) -> None:
        exponent = round(math.log2(fan_in**-0.5 / math.sqrt(7 / 3 * 85 / 4)))
        self._exponent_base = np.uint64(((127 + exponent) << 7) * 0x0001_0001_0001_0001)
        self._source = np.random.SFC64(seed)

    def skip(self, count: int) -> None:
        """Go past so many values, a multiple of four: SFC64 cannot jump, so they are drawn and dropped."""
        self._source.random_raw(_words(count), output=False)

    def take(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
        """The next so many values, a multiple of four."""
        words = np.empty(_words(count), dtype="<u8")
        for start in range(0, len(words), 1 << 15):  # pieces that stay in the cache
            piece = words[start : start + (1 << 15)]
            np.bitwise_and(self._source.random_raw(len(piece)), self._kept_bits, out=piece)
            piece += self._exponent_base
        return words.view("<i2")


def _words(count: int) -> int:
    if count % 4:
        raise ValueError(f"{count} values are no whole words: each shape has rows of a multiple of 4")
    return count // 4


def _tensor(bits: np.ndarray[tuple[int], np.dtype[np.int16]], inputs: int) -> torch.Tensor:
    import torch

    return torch.from_numpy(bits).view(torch.bfloat16).reshape(-1, inputs)


def _byte_tokenizer_json() -> str:
    """A ``tokenizer.json`` whose ids are bytes: the byte-level alphabet, without merges."""
    # GPT-2's alphabet: a printable byte is written as itself, the others as the characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
        }
    )
