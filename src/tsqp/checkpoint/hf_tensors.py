"""Where a Hugging Face file keeps each tensor of a model, and in which order its rows are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsqp.checkpoint.hf_families import FAMILIES, Family
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.config.groups import GroupName, linear_groups, part_tensor
from tsqp.config.model import ModelConfig

if TYPE_CHECKING:
    import torch

_FUSED: dict[GroupName, str] = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
_OF_HEADS = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.q_norm.", "self_attn.k_norm.")


@dataclass(frozen=True)
class Stored:
    """Rows ``first`` to ``end`` of the tensor ``name`` in a file; all for None.

    ``order``: which number of a head of the file each number of a head here is; as they are for None.
    """

    name: str
    first: int | None = None
    end: int | None = None
    order: tuple[int, ...] | None = None

    def taken_from(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, from the one in the file: not copied where nothing has to be moved."""
        rows = tensor[self.first : self.end] if self.end is not None else tensor
        if self.order is None:
            return rows
        heads = rows.reshape(-1, len(self.order), *rows.shape[1:])
        return heads[:, list(self.order)].reshape(rows.shape)


def stored_tensors(config: ModelConfig) -> dict[str, Stored]:
    """Where each tensor is, by its name in ``tensor_shapes``."""
    family = FAMILIES[config.architecture]
    order = _head_order(config, family)
    places = {
        name: Stored(name, order=order if any(part in name for part in _OF_HEADS) else None)
        for name in tensor_shapes(config)
    }
    if not family.fused:
        return places
    for layer in range(config.num_layers):
        for group, fused in _FUSED.items():
            parts = linear_groups(config)[group]
            for index, (part, _) in enumerate(parts.parts):
                name = part_tensor(layer, part, "weight")
                first, end = parts.part_rows(index)
                places[name] = Stored(part_tensor(layer, fused, "weight"), first, end, places[name].order)
    return places


def stored_shapes(config: ModelConfig, places: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file has to hold, by its name there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        place = places[name]
        rows = max(shapes.get(place.name, (0,))[0], place.end or shape[0])
        shapes[place.name] = (rows, *shape[1:])
    return shapes


def _head_order(config: ModelConfig, family: Family) -> tuple[int, ...] | None:
    """The order of the numbers of a head in which i and i + head_dim/2 are a pair that is rotated together.

    Q·Kᵀ is the same in any order that Q and K share. A part of each head that is rotated comes first in the file.
    """
    size, turned = config.head_dim, config.rope.rotary_dim or config.head_dim
    if family.neighbours:
        return (*range(0, size, 2), *range(1, size, 2))
    if turned == size:
        return None
    kept, (half, pairs) = list(range(turned, size)), (size // 2, turned // 2)
    split = half - pairs
    return (*range(pairs), *kept[:split], *range(pairs, turned), *kept[split:])
