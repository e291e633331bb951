"""Where a Hugging Face file keeps each tensor of a model, and in which order its rows are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsqp.checkpoint.hf_families import FAMILIES
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.config.groups import GroupName, linear_groups, part_tensor
from tsqp.config.model import ModelConfig

if TYPE_CHECKING:
    import torch

_FUSED: dict[GroupName, str] = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
# Of models of text and pictures: where the tensors for text are, in transformers' present names and in earlier ones.
_TEXT_PARTS = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
_OTHER_PARTS = ("vision_tower", "multi_modal_projector")
_OF_HEADS = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.q_norm.", "self_attn.k_norm.")


@dataclass(frozen=True)
class Stored:
    """Rows ``first`` to ``end`` of the tensor ``name`` in a file; all for None.

    ``order``: which number of a head of the file each number of a head here is; as they are for None. The numbers of a
    head are rows, and those of the next head come after them; with ``columns`` a head is one row.
    """

    name: str
    first: int | None = None
    end: int | None = None
    order: tuple[int, ...] | None = None
    columns: bool = False

    def taken_from(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, from the one in the file: not copied where nothing has to be moved."""
        return self.ordered(tensor[self.first : self.end] if self.end is not None else tensor)

    @property
    def unit(self) -> int:
        """How many rows are moved among themselves: those of a head, or one."""
        return 1 if self.order is None or self.columns else len(self.order)

    def blocks(
        self, first: int, end: int, most: int, stored: Callable[[int, int], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows ``first`` to ``end`` in parts of ``most`` rows or a head: the first row of each, and its rows.

        ``stored`` reads a range of rows of the tensor in the file: those of whole heads.
        """
        unit, start = self.unit, self.first or 0
        step = unit * max(1, most // unit)
        for block in range(first // step * step, end, step):
            begin, stop = max(first, block), min(end, block + step)
            low, high = begin // unit * unit, -(-stop // unit) * unit
            yield begin, self.ordered(stored(start + low, start + high))[begin - low : stop - low]

    def ordered(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of whole heads of the file, in the order of this package."""
        if self.order is None:
            return rows
        if self.columns:
            return rows[:, list(self.order)]
        heads = rows.reshape(-1, len(self.order), *rows.shape[1:])
        return heads[:, list(self.order)].reshape(rows.shape)


def text_tensors(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The tensors for text by the names that a model of text alone has, and which other parts there are."""
    named, others = dict[str, str](), set[str]()
    for name in names:
        other = next((part for part in _OTHER_PARTS if name.removeprefix("model.").startswith(f"{part}.")), None)
        if other is not None:
            others.add(other)
            continue
        prefix = next((prefix for prefix in _TEXT_PARTS if name.startswith(prefix)), "")
        named[_TEXT_PARTS.get(prefix, "") + name.removeprefix(prefix)] = name
    return named, tuple(sorted(others))


def stored_tensors(config: ModelConfig, *, moved: bool = False) -> dict[str, Stored]:
    """Where each tensor is, by its name in ``tensor_shapes``. ``moved``: see GgufFamily."""
    family = FAMILIES[config.architecture]
    order = _head_order(config, neighbours=family.neighbours or moved)
    places = {
        name: Stored(
            name,
            order=order if any(part in name for part in _OF_HEADS) else None,
            columns=config.qk_norm_apart and "_norm." in name,
        )
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


def _head_order(config: ModelConfig, *, neighbours: bool) -> tuple[int, ...] | None:
    """The order of the numbers of a head in which i and i + head_dim/2 are a pair that is rotated together.

    Q·Kᵀ is the same in any order that Q and K share. A part of each head that is rotated comes first in the file.
    """
    size, turned = config.head_dim, config.rope.rotary_dim or config.head_dim
    if neighbours:
        return (*range(0, size, 2), *range(1, size, 2))
    if turned == size:
        return None
    kept, (half, pairs) = list(range(turned, size)), (size // 2, turned // 2)
    split = half - pairs
    return (*range(pairs), *kept[:split], *range(pairs, turned), *kept[split:])
