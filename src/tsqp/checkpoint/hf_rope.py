"""The rotary embedding of a ``config.json``, to and from a RopeConfig.

Both spellings are read: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters`` of transformers 5, also with an
object for each layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.hf_families import Family
from tsqp.config.model import RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

_KINDS = "default, linear, llama3, yarn, dynamic, longrope"


def parse_ropes(
    given: Mapping[str, Any], family: Family, head_dim: int, max_positions: int, where: str
) -> tuple[RopeConfig, RopeConfig]:
    """Those of layers without a window and with one, the same where nothing says otherwise. Raises as parse_rope."""
    nested = given.get("rope_scaling") or given.get("rope_parameters") or {}
    by_type = isinstance(nested, dict) and any(isinstance(value, dict) for value in nested.values())
    if not by_type and family.local_theta is None:
        rope = parse_rope(given, family, head_dim, max_positions, where)
        return rope, rope
    if family.windows not in ("listed", "qwen"):
        raise UnsupportedModel(f"{where}: rope_parameters per layer type are not implemented for this model_type")
    if by_type:
        full, sliding = (nested.get(kind) for kind in ("full_attention", "sliding_attention"))
        if family.local_theta is None and not (isinstance(full, dict) and isinstance(sliding, dict)):
            raise CorruptCheckpoint(f"{where}: rope_parameters must have full_attention and sliding_attention")
    else:
        full, sliding = given.get("rope_scaling"), None
        if given.get("rope_parameters"):
            raise CorruptCheckpoint(f"{where}: rope_parameters must be given per layer type")
    own = {key: value for key, value in given.items() if key not in ("rope_scaling", "rope_parameters")}
    local = own | {"rope_parameters": sliding}
    if family.local_theta is not None:
        local["rope_theta"] = given.get("rope_local_base_freq")
    of_local = replace(family, theta=family.local_theta or family.theta)
    return (
        parse_rope(own | {"rope_parameters": full}, family, head_dim, max_positions, where),
        parse_rope(local, of_local, head_dim, max_positions, where),
    )


def parse_rope(given: Mapping[str, Any], family: Family, head_dim: int, max_positions: int, where: str) -> RopeConfig:
    """Raises UnsupportedModel for what is not implemented, by name, and CorruptCheckpoint for an invalid key."""
    # The order of transformers 5: a rope_scaling that is not empty wins over rope_parameters.
    parameters = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise CorruptCheckpoint(f"{where}: the rope parameters must be an object, not {parameters!r}")
    theta = Keys({"rope_theta": parameters.get("rope_theta", given.get("rope_theta"))}, where)
    original = given.get("original_max_position_embeddings", family.original_positions)
    if original is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    rotary_dim = _rotary_dim(given, parameters, family, head_dim, where)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return _Reader(
        keys=Keys(parameters, f"{where} (rope)"),
        given=parameters,
        theta=theta.number("rope_theta", family.theta),
        rotary_dim=rotary_dim,
        pairs=(rotary_dim or head_dim) // 2,
        max_positions=max_positions,
        where=where,
    ).read(family.renamed_ropes.get(kind, kind) if isinstance(kind, str) else kind)


def _rotary_dim(
    given: Mapping[str, Any], parameters: Mapping[str, Any], family: Family, head_dim: int, where: str
) -> int | None:
    """How many numbers of a head are rotated; None for all."""
    factor = parameters.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if factor in (None, 1):
        return None
    if not family.partial_rotary:
        raise UnsupportedModel(f"{where}: a partial_rotary_factor other than 1 is not implemented for this model_type")
    part = int(head_dim * Keys({"partial_rotary_factor": factor}, where).number("partial_rotary_factor"))
    if not 2 <= part <= head_dim or part % 2:
        raise CorruptCheckpoint(f"{where}: partial_rotary_factor {factor} does not leave pairs of {head_dim} numbers")
    return part if part < head_dim else None


@dataclass(frozen=True)
class _Reader:
    """The parameters of a rope type; ``pairs`` of each head are rotated."""

    keys: Keys
    given: Mapping[str, Any]
    theta: float
    rotary_dim: int | None
    pairs: int
    max_positions: int
    where: str

    def read(self, kind: object) -> RopeConfig:
        match kind:
            case "default":
                return self._rope("default")
            case "linear":
                return self._rope("linear", factor=self.keys.number("factor"))
            case "llama3":
                return self._llama3()
            case "yarn":
                return self._yarn()
            case "dynamic":
                return self._dynamic()
            case "longrope":
                return self._longrope()
        raise UnsupportedModel(f"{self.where}: rope type {kind!r} is not implemented; supported are {_KINDS}")

    def _rope(self, kind: Any, **fields: Any) -> RopeConfig:
        return RopeConfig(self.theta, kind, rotary_dim=self.rotary_dim, **fields)

    def _original(self) -> int:
        return self.keys.size("original_max_position_embeddings", self.max_positions)

    def _llama3(self) -> RopeConfig:
        low, high = self.keys.number("low_freq_factor"), self.keys.number("high_freq_factor")
        if high <= low:
            raise CorruptCheckpoint(f"{self.where} (rope): high_freq_factor must be above low_freq_factor")
        return self._rope(
            "llama3",
            factor=self.keys.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=self._original(),
        )

    def _yarn(self) -> RopeConfig:
        original = self._original()
        factor = self.keys.number("factor", self.max_positions / original)
        if self.theta == 1.0:
            raise CorruptCheckpoint(f"{self.where} (rope): yarn is not defined for a rope_theta of 1")
        return self._rope(
            "yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=self._positive_or("beta_fast", 32.0),
            beta_slow=self._positive_or("beta_slow", 1.0),
            truncate=self.keys.flag("truncate", True),
            attention_factor=self.keys.number("attention_factor", self._yarn_attention(factor)),
        )

    def _yarn_attention(self, factor: float) -> float:
        """The attention factor where none is given (Peng et al. 2023, section 3.4), as DeepSeek's keys change it."""

        def scaled(by: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

        if self.given.get("mscale") and self.given.get("mscale_all_dim"):
            return scaled(self.keys.number("mscale")) / scaled(self.keys.number("mscale_all_dim"))
        return scaled(1.0)

    def _positive_or(self, key: str, default: float) -> float:
        """A number, where null and 0 mean that there is none."""
        return self.keys.number(key) if self.given.get(key) else default

    def _dynamic(self) -> RopeConfig:
        """Its original context is what the file calls its context: ``max_position_embeddings``."""
        if self.pairs < 2:
            raise CorruptCheckpoint(f"{self.where} (rope): dynamic needs more than one pair of numbers in a head")
        factor = self.keys.number("factor")
        if factor < 1:
            raise CorruptCheckpoint(f"{self.where} (rope): the factor of dynamic must be at least 1, not {factor}")
        return self._rope("dynamic", factor=factor, original_max_positions=self.max_positions)

    def _longrope(self) -> RopeConfig:
        original = self._original()
        if original < 2:  # whose logarithm divides
            raise CorruptCheckpoint(
                f"{self.where} (rope): original_max_position_embeddings of longrope must be at least 2, not {original}"
            )
        factor = self.keys.number("factor", self.max_positions / original)
        default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return self._rope(
            "longrope",
            factor=factor,
            original_max_positions=original,
            attention_factor=self.keys.number("attention_factor", default),
            short_factors=self.keys.numbers("short_factor", self.pairs),
            long_factors=self.keys.numbers("long_factor", self.pairs),
        )


def context_length(rope: RopeConfig, max_positions: int) -> int:
    """The positions that a model has under its scaling, where its file says ``max_positions``.

    yarn and dynamic are added to a file whose ``max_position_embeddings`` stays what it was.
    """
    if rope.kind in ("yarn", "dynamic"):
        return max(max_positions, int(rope.original_max_positions * rope.factor))
    return max_positions


def rope_settings(rope: RopeConfig, max_positions: int) -> dict[str, Any]:
    """The keys of a ``config.json`` that ``parse_rope`` and transformers read back as ``rope``."""
    settings: dict[str, Any] = {
        "rope_theta": rope.theta,
        "rope_scaling": _scaling(rope),
        "max_position_embeddings": rope.original_max_positions if rope.kind == "dynamic" else max_positions,
    }
    return settings


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    original = {"original_max_position_embeddings": rope.original_max_positions}
    match rope.kind:
        case "none" | "default":
            return None
        case "linear" | "dynamic":
            return {"rope_type": rope.kind, "factor": rope.factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                **original,
            }
        case "yarn":
            return {
                "rope_type": "yarn",
                "factor": rope.factor,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
                "attention_factor": rope.attention_factor,
                **original,
            }
        case "longrope":
            return {
                "rope_type": "longrope",
                "factor": rope.factor,
                "attention_factor": rope.attention_factor,
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
                **original,
            }
