"""The operators of a layer over paged caches, on a device: nothing here makes the host wait for the device.

Rows know where their keys go (``slots``) by numbers that lie on the device before the first layer. Two kinds of
attention read them: one sequence after another for any rows (``SpanAttention``), and all rows at once, each of its own
sequence, over a padded number of pages (``StepAttention``), whose launches depend on numbers of rows and pages alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tsqp.config.groups import GroupKey
from tsqp.model.attention import attend, causal_mask, first_visible
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.kernels import Heads, Kernels
from tsqp.model.linear import LinearProduct
from tsqp.model.norms import soft_capped
from tsqp.model.pending import Deferred, Pending, Steps
from tsqp.model.rotary import rotate
from tsqp.untrusted.pages import PAGE, PagedSequence, Pages

NO_SPANS: Chunk[KVCache] = Chunk(0, ())  # of rows whose places only the kernels know


class DeviceLinears:
    """Products in fresh memory, which a device's allocator gives without a call to the driver; see ``Linears``."""

    def __init__(self, weights: Mapping[GroupKey, LinearProduct]) -> None:
        self._weights = weights

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        """See Linears."""
        return self._weights[key].input(rows)

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        """See Linears."""
        return Deferred(lambda: self._weights[key].product(x))


class PagedKernels:
    """``Kernels`` whose keys and values go into pages: row i of a chunk into ``slots[i]``, int64 (T,)."""

    def __init__(self, plain: Kernels, pages: Pages, slots: torch.Tensor) -> None:
        self._pages, self._slots = pages, slots
        self.rms_norm, self.add_rms_norm, self.layer_norm = plain.rms_norm, plain.add_rms_norm, plain.layer_norm
        self.silu_mul, self.gelu_mul, self.relu_squared = plain.silu_mul, plain.gelu_mul, plain.relu_squared
        self.widen = plain.widen

    def store(
        self,
        layer: int,
        queries: Heads,
        keys: Heads,
        values: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q: torch.Tensor,
        spans: Sequence[SequenceRows[KVCache]],
    ) -> None:
        """See Kernels; ``spans`` are not looked at."""
        held_keys, held_values = self._pages.slots(layer)
        heads, head_dim = held_keys.shape[1:]
        both = (len(q), heads)
        if keys.rows is queries.rows and keys.column == queries.column + len(q) * head_dim:
            turned, turned_keys = rotate(_split(queries, sum(both), head_dim), cos, sin).split(both, dim=1)
        else:  # normed, each in memory of its own
            turned = rotate(_split(queries, len(q), head_dim), cos, sin)
            turned_keys = rotate(_split(keys, heads, head_dim), cos, sin)
        q.copy_(turned.transpose(0, 1))
        held_keys.index_copy_(0, self._slots, turned_keys)
        held_values.index_copy_(0, self._slots, _split(values, heads, head_dim))


@dataclass(frozen=True)
class PagedSpan:
    """Rows of one sequence in a chunk, and its pages: numbers on the host, and int32 on the device."""

    rows: slice
    position: int
    end: int
    pages: Sequence[int]
    index: torch.Tensor

    @classmethod
    def of(cls, span: SequenceRows[PagedSequence], index: torch.Tensor) -> PagedSpan:
        """``index``: all pages up to the last position of ``span``, on the device."""
        return cls(span.slice, span.position, span.end, tuple(span.cache.pages[: len(index)]), index)


@dataclass(frozen=True)
class SpanAttention:
    """See ChunkAttention. One sequence after another, each over the keys that it has and no more."""

    pages: Pages
    spans: Sequence[PagedSpan]
    windows: tuple[int | None, ...]
    scale: float | None
    cap: float | None

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        """See ChunkAttention."""
        heads, window = out.view(len(out), q.shape[0], q.shape[2]), self.windows[layer]
        for span in self.spans:
            first = first_visible(span.position, window)
            skipped = first // PAGE
            own, index = span.pages[skipped:], span.index[skipped:]
            k, v = self.pages.view(layer, own, index, first - skipped * PAGE, span.end - skipped * PAGE)
            attend_fused(q[:, span.rows], k, v, span.position, first, window, heads[span.rows], self.scale, self.cap)
        return
        yield  # a generator that hands out no products


@dataclass(frozen=True)
class Visible:
    """What rows see within one window: their pages int32 (T, n), and bool (T, 1, 1, n·PAGE) for each key there."""

    index: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def empty(cls, rows: int, pages: int, window: int | None, device: torch.device) -> Visible:
        """Room for ``fill``, of rows whose sequences have at most ``pages`` pages."""
        seen = pages if window is None else min(pages, window // PAGE + 2)
        index = torch.zeros(rows, seen, dtype=torch.int32, device=device)
        return cls(index, torch.zeros(rows, 1, 1, seen * PAGE, dtype=torch.bool, device=device))

    def fill(self, table: torch.Tensor, positions: torch.Tensor, window: int | None) -> None:
        """``table`` int32 (T, pages) has each row's pages in order, ``positions`` int64 (T,)."""
        rows, seen = self.index.shape
        first = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp_(min=0) // PAGE
        numbers = first.unsqueeze(1) + torch.arange(seen, device=table.device)  # may be past the end of the table
        self.index.copy_(table.gather(1, numbers.clamp(max=table.shape[1] - 1)))
        keys = (numbers.unsqueeze(2) * PAGE + torch.arange(PAGE, device=table.device)).view(rows, 1, 1, -1)
        query = positions.view(-1, 1, 1, 1)
        mask = keys <= query
        self.mask.copy_(mask if window is None else mask & (keys > query - window))


@dataclass(frozen=True)
class StepAttention:
    """See ChunkAttention. All rows at once, each over its own pages: ``visible`` by window."""

    pages: Pages
    visible: Mapping[int | None, Visible]
    windows: tuple[int | None, ...]
    scale: float | None
    cap: float | None

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        """See ChunkAttention."""
        visible = self.visible[self.windows[layer]]
        rows, seen = visible.index.shape
        held = self.pages.memory[layer]
        found = held.index_select(1, visible.index.flatten())  # (2, T·n, PAGE, kv_heads, head_dim)
        k, v = found.view(2, rows, seen * PAGE, *held.shape[3:]).transpose(2, 3)
        heads, _, head_dim = q.shape
        # The heads of a group share their keys as rows of one product: a kernel with a mask wants as many of both.
        grouped = q.transpose(0, 1).view(rows, k.shape[1], heads // k.shape[1], head_dim)
        if self.cap is None:
            mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible.mask, scale=self.scale)
        else:
            mixed = attend_capped(grouped, k, v, visible.mask, self.scale, self.cap)
        out.copy_(mixed.reshape(rows, heads * head_dim))
        return
        yield  # a generator that hands out no products


def attend_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    first_key: int,
    window: int | None,
    out: torch.Tensor,
    scale: float | None,
    cap: float | None,
) -> None:
    """``tsqp.model.attention.attend`` in the forms for which torch has fused kernels on CUDA. Capped scores have none.

    All rows of a text from its beginning need no mask and may be grouped; with a mask there have to be as many heads of
    keys as of queries. (torch's bias for later rows of a causal text is a subclass that no dispatch mode can make.)
    """
    if cap is not None:
        attend(q, k, v, position, first_key, window, out, scale, cap)
        return
    heads, rows, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    if rows == 1:  # sees every key: the heads of a group are rows of one product
        grouped = q.view(1, kv_heads, heads // kv_heads, head_dim)
        mixed = F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scale)
        out.copy_(mixed.view(1, heads, head_dim))
        return
    if rows == keys and (window is None or rows <= window):
        mixed = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
    else:
        mask = causal_mask(position, rows, first_key, keys, window, q.device)
        k, v = (one.repeat_interleave(heads // kv_heads, dim=0)[None] for one in (k, v))
        mixed = F.scaled_dot_product_attention(q[None], k, v, attn_mask=mask, scale=scale)
    out.copy_(mixed[0].transpose(0, 1))


def attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, cap: float
) -> torch.Tensor:
    """Attention with a soft cap of its scores: q (T, kv_heads, n, head_dim), k and v (T, kv_heads, keys, head_dim).

    ``mask``: True where a query may look, as broadcast to (T, kv_heads, n, keys).
    """
    scaled = q * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = soft_capped(scaled @ k.transpose(2, 3), cap).masked_fill_(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def _split(x: Heads, heads: int, head_dim: int) -> torch.Tensor:
    """Heads as (T, heads, head_dim)."""
    return x.rows[:, x.column : x.column + heads * head_dim].view(-1, heads, head_dim)
