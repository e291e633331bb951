"""LoRA adapters of one model, in the memory of the trusted side, and what they add to products: ``docs/lora.md``.

Covers: a row has what its own adapter adds, in the same bits in any company (tests/trusted/test_lora.py).
Does not cover: an adapter whose numbers overflow makes logits that are none, and the pass that it is in fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tsqp.arith.bits import Array, bits
from tsqp.arith.row_threads import row_threads
from tsqp.checkpoint.adapter import LayerPart, LowRank
from tsqp.config.groups import GroupKey, LinearGroup, group_keys, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.model import adapter_loops as loops
from tsqp.model.batch import SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.meter import Meter

SHARE_NUMBERS = 1 << 20  # multiplied, from which on waking another thread pays

Spans = Sequence[SequenceRows[KVCache]]


class Adapters:
    """Adapters by name, laid out for the loops.

    ``tables`` int64 (calls of a pass, adapters, numbers), in the order of ``group_keys``: see ``adapter_loops``.
    ``own_products``: products are this side's memory, and may be changed in place.
    """

    def __init__(
        self,
        config: ModelConfig,
        adapters: Mapping[str, Mapping[LayerPart, LowRank]],
        meter: Meter,
        *,
        own_products: bool,
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(adapters)}
        self._meter = meter
        self._own_products = own_products
        self._memory: list[Array] = []  # what the addresses lead to
        groups, keys = linear_groups(config), group_keys(config)
        self.tables = np.zeros((len(keys), len(adapters), loops.ADAPTER_NUMBERS), np.int64)
        self._calls = {key: number for number, key in enumerate(keys)}
        for (name, layer), tables in zip(keys, self.tables, strict=True):
            if layer is not None:
                for table, parts in zip(tables, adapters.values(), strict=True):
                    self._lay_out(table, groups[name], layer, parts)
        loops.add_low_rank(*(np.zeros((1, 1), np.float32),) * 2, *self._none(), 0, 1)  # compiled now, not by a call

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(self._numbers)

    def of(self, spans: Spans) -> ChunkAdapters | None:
        """Those of the rows of a chunk; None where no row has one. Raises KeyError for a name that is none of them."""
        if all(span.adapter is None for span in spans):
            return None
        numbers = [-1 if span.adapter is None else self._numbers[span.adapter] for span in spans]
        return ChunkAdapters(self, np.repeat(np.array(numbers, np.int64), [span.rows for span in spans]))

    def add(self, key: GroupKey, of_row: Array, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """See ``ChunkAdapters.added``."""
        table = self.tables[self._calls[key]]
        if not table[:, loops.LANES].any():
            return product
        with self._meter.operator("lora"):
            wide = product.dtype == torch.float32
            y = product if wide and self._own_products else product.to(torch.float32, copy=True)
            per_row = int(table[:, loops.LANES].max()) * (x.shape[1] + y.shape[1])
            arguments = bits(x.float()), bits(y), of_row, table
            least = max(2, SHARE_NUMBERS // per_row)
            row_threads().run(loops.add_low_rank, len(of_row), *arguments, least=least)
            return y if wide else y.to(product.dtype)

    def _lay_out(self, table: Array, group: LinearGroup, layer: int, parts: Mapping[LayerPart, LowRank]) -> None:
        """One adapter in one group of one layer."""
        own = [(index, parts[layer, part]) for index, (part, _) in enumerate(group.parts) if (layer, part) in parts]
        if not own:
            return
        table[loops.A] = self._kept(torch.cat([pair.a for _, pair in own]).T)
        for number, (index, pair) in enumerate(own):
            first, end = group.part_rows(index)
            at = loops.PARTS + number * loops.PART_NUMBERS
            numbers = table[loops.LANES], len(pair.a), first, end - first, self._kept(pair.b.T)
            table[at : at + loops.PART_NUMBERS] = numbers
            table[loops.LANES] += len(pair.a)

    def _kept(self, matrix: torch.Tensor) -> int:
        """The address of a copy of a matrix, row after row."""
        self._memory.append(np.ascontiguousarray(matrix.float().numpy()))
        return int(self._memory[-1].ctypes.data)

    def _none(self) -> tuple[Array, Array]:
        """A row without an adapter, and a table."""
        return np.full(1, -1, np.int64), np.zeros((1, loops.ADAPTER_NUMBERS), np.int64)


class ChunkAdapters:
    """Adapters of the rows of one chunk: ``of_row`` int64 (T,) has the number of each row's, -1 for none."""

    def __init__(self, adapters: Adapters, of_row: Array) -> None:
        self.adapters = adapters
        self.of_row = of_row

    def added(self, key: GroupKey, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """What the adapters add to the product (T, out) of x (T, in), and the product: it may be the same memory."""
        return self.adapters.add(key, self.of_row, x, product)
