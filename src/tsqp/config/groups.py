"""Linear groups: the matrices that share an input, stored concatenated so that one call is one GEMM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tsqp.config.model import ModelConfig

GroupName = Literal["qkv", "o", "gate_up", "down", "lm_head"]
LAYER_GROUPS: tuple[GroupName, ...] = ("qkv", "o", "gate_up", "down")
GroupKey = tuple[GroupName, int | None]  # the LM head has layer None


def group_label(key: GroupKey) -> str:
    """``group qkv of layer 3``, for a person."""
    name, layer = key
    return f"group {name}" if layer is None else f"group {name} of layer {layer}"


@dataclass(frozen=True)
class LinearGroup:
    """``y = x Wᵀ + b`` with W of shape (out_features, in_features), rows in the order of ``parts``.

    ``parts`` names the matrices as a checkpoint does, with their number of output rows.
    """

    name: GroupName
    in_features: int
    parts: tuple[tuple[str, int], ...]
    bias: bool

    @property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.parts)

    def part_rows(self, part: int | None) -> tuple[int, int]:
        """First and past-the-last output row of one part, or of the whole group for None."""
        if part is None:
            return 0, self.out_features
        start = sum(rows for _, rows in self.parts[:part])
        return start, start + self.parts[part][1]


def linear_groups(config: ModelConfig) -> dict[GroupName, LinearGroup]:
    """The five linear groups of a model, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.q_size, config.kv_size
    gate = (("mlp.gate_proj", inner),) if config.gated_mlp else ()
    groups = (
        LinearGroup(
            "qkv",
            hidden,
            (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
            config.qkv_bias,
        ),
        LinearGroup("o", q, (("self_attn.o_proj", hidden),), config.o_bias),
        LinearGroup("gate_up", hidden, (*gate, ("mlp.up_proj", inner)), config.mlp_bias),
        LinearGroup("down", inner, (("mlp.down_proj", hidden),), config.mlp_bias),
        LinearGroup("lm_head", hidden, (("lm_head", config.vocab_size),), False),
    )
    return {group.name: group for group in groups}


def cut(group: LinearGroup, first: int, end: int) -> LinearGroup:
    """Output features ``first`` to ``end`` of a group: every part is there, with its rows among them, maybe none."""
    rows = [group.part_rows(part) for part in range(len(group.parts))]
    widths = [max(0, min(stop, end) - max(start, first)) for start, stop in rows]
    return replace(group, parts=tuple((name, width) for (name, _), width in zip(group.parts, widths, strict=True)))


def part_tensor(layer: int | None, part: str, kind: str) -> str:
    """A part's name in a Hugging Face checkpoint; ``layer`` is None for the LM head, ``kind`` is weight or bias."""
    return f"{part}.{kind}" if layer is None else f"model.layers.{layer}.{part}.{kind}"


def group_keys(config: ModelConfig) -> list[GroupKey]:
    """Every linear group of a model, layer by layer, the LM head last."""
    keys: list[GroupKey] = [(name, layer) for layer in range(config.num_layers) for name in LAYER_GROUPS]
    return [*keys, ("lm_head", None)]
