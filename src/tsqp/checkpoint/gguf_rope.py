"""The rotary embeddings of a GGUF file."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from tsqp.checkpoint.config_bounds import MAX_SIZE
from tsqp.checkpoint.hf_families import Family
from tsqp.config.model import RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tsqp.checkpoint.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
ROPE_SHORT, ROPE_LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = {ROPE_FACTORS, ROPE_SHORT, ROPE_LONG}
_SCALINGS = ("none", "linear", "yarn", "longrope")


def llama3_factors(rope: RopeConfig, head_dim: int) -> list[float]:
    """The divisor of each of the head_dim/2 rotary frequencies under Llama 3.1's scaling, which GGUF stores."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope.theta ** (2 * i / head_dim)
        turns = rope.original_max_positions / wavelength
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        factors.append(1 / ((1 - kept) / rope.factor + kept))
    return factors


def positive_integer(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.integer(key, default)
    if value < 1:
        raise CorruptCheckpoint(f"{file.path}: {key} must be positive, not {value}")
    if value > MAX_SIZE:
        raise CorruptCheckpoint(f"{file.path}: {key} must be at most {MAX_SIZE}, not {value}")
    return value


def positive_number(file: GgufFile, key: str, default: float | None) -> float:
    value = file.number(key, default)
    if value <= 0:
        raise CorruptCheckpoint(f"{file.path}: {key} must be positive, not {value}")
    return value


def read_rope(
    file: GgufFile, name: str, family: Family, head_dim: int, rotary_dim: int | None, max_positions: int
) -> RopeConfig:
    """That of most layers. ``rotary_dim`` numbers of each head are rotated, all for None.

    Raises UnsupportedModel, by name, and CorruptCheckpoint.
    """
    rope = _read(file, name, family, rotary_dim or head_dim, max_positions)
    return replace(rope, rotary_dim=rotary_dim)


def read_window_rope(file: GgufFile, name: str, family: Family, rope: RopeConfig) -> RopeConfig:
    """That of layers with a window: ``rope``, with another base if the file says so. Gemma 3's is not scaled."""
    key = f"{name}.rope.freq_base_swa"
    if family.local_theta is not None:
        return RopeConfig(positive_number(file, key, family.local_theta))
    return replace(rope, theta=positive_number(file, key, rope.theta)) if family.pattern is not None else rope


def _read(file: GgufFile, name: str, family: Family, head_dim: int, max_positions: int) -> RopeConfig:
    default = family.theta if family.local_theta is not None else 10_000.0
    theta = positive_number(file, f"{name}.rope.freq_base", default)
    key, stored = f"{name}.rope.scaling", file.shapes()
    given = file.number(f"{key}.factor", file.number(f"{name}.rope.scale_linear", 0.0))
    # llama.cpp takes a file without a type to be linear, and a factor of 0 to be none.
    kind = "longrope" if ROPE_LONG in stored else file.text(f"{key}.type", "none" if given in (0, 1) else "linear")
    if kind not in _SCALINGS:
        raise UnsupportedModel(
            f"{file.path}: rope scaling {kind!r} is not implemented; supported are {', '.join(_SCALINGS)}"
        )
    if ROPE_FACTORS in stored:
        if kind != "none":
            raise UnsupportedModel(f"{file.path}: {kind} rope scaling together with {ROPE_FACTORS} is not implemented")
        return _llama3_rope(file, name, theta, head_dim)
    if kind == "none":
        return RopeConfig(theta)
    original = positive_integer(file, f"{key}.original_context_length", max_positions)
    factor = positive_number(file, f"{key}.factor", file.number(f"{name}.rope.scale_linear", max_positions / original))
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    attention = positive_number(file, f"{key}.attn_factor", 1.0)
    if kind == "yarn":
        return _yarn_rope(file, key, RopeConfig(theta, "yarn", factor, original_max_positions=original), attention)
    return _longrope(file, RopeConfig(theta, "longrope", factor, original_max_positions=original), attention, head_dim)


def _yarn_rope(file: GgufFile, key: str, rope: RopeConfig, attention: float) -> RopeConfig:
    """What llama.cpp makes of the keys: ``attn_factor`` is beside YaRN's own attention factor."""
    if rope.theta == 1.0 or rope.factor < 1:
        raise CorruptCheckpoint(f"{file.path}: yarn is not defined for a base of 1 or a factor below 1")
    if file.has(f"{key}.yarn_ext_factor") and file.number(f"{key}.yarn_ext_factor") not in (1.0, -1.0):
        raise UnsupportedModel(f"{file.path}: a yarn_ext_factor other than 1 is not implemented")
    if file.has(f"{key}.yarn_log_multiplier"):
        raise UnsupportedModel(f"{file.path}: {key}.yarn_log_multiplier is not implemented")
    fast, slow = file.number(f"{key}.yarn_beta_fast", 32.0), file.number(f"{key}.yarn_beta_slow", 1.0)
    if fast <= 0 or slow <= 0:
        raise CorruptCheckpoint(f"{file.path}: yarn_beta_fast and yarn_beta_slow must be positive")
    attention *= file.number(f"{key}.yarn_attn_factor", 1.0) * (0.1 * math.log(rope.factor) + 1)
    return replace(rope, beta_fast=fast, beta_slow=slow, attention_factor=attention)


def _longrope(file: GgufFile, rope: RopeConfig, attention: float, head_dim: int) -> RopeConfig:
    """The divisors of each frequency, which GGUF holds as two tensors. ``attn_factor`` is all of the attention factor.

    llama.cpp takes the divisors by the context that it was started with; here it is the text that counts, as the
    authors and transformers have it.
    """
    factors = []
    for name in (ROPE_SHORT, ROPE_LONG):
        if file.shapes().get(name) != (head_dim // 2,):
            raise CorruptCheckpoint(f"{file.path}: longrope needs {name} with {head_dim // 2} numbers")
        factors.append(tuple(float(str(value)) for value in file.tensor(name).float().numpy()))
        if not all(0 < value < math.inf for value in factors[-1]):
            raise CorruptCheckpoint(f"{file.path}: the factors in {name} must be positive numbers")
    return replace(rope, attention_factor=attention, short_factors=factors[0], long_factors=factors[1])


def _llama3_rope(file: GgufFile, name: str, theta: float, head_dim: int) -> RopeConfig:
    """Llama 3.1's scaling, which GGUF holds as its result: one divisor for each frequency.

    The parameters are taken to be Meta's (low 1, high 4, 8,192 positions) with the largest divisor as the factor, and
    then have to give every stored divisor again. Other divisors are refused: their rule is unknown.
    """
    stored = file.tensor(ROPE_FACTORS).flatten().tolist()
    if not all(0 < value < math.inf for value in stored):
        raise CorruptCheckpoint(f"{file.path}: the factors in {ROPE_FACTORS} must be positive numbers")
    if all(value == 1.0 for value in stored):
        return RopeConfig(theta)
    original = file.integer(f"{name}.rope.scaling.original_context_length", 8192)
    rope = RopeConfig(theta, "llama3", round(max(stored), 4), original_max_positions=original)
    derived = llama3_factors(rope, head_dim)
    same = len(derived) == len(stored) and all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(derived, stored, strict=True)
    )
    if not same:
        raise UnsupportedModel(f"{file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3.1's scaling")
    return rope
