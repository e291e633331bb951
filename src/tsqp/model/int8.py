"""Linear layers in integers: 8-bit weights per output channel, 8-bit activations per token, exact sums between them.

y[t, j] = float32(Σ_k xq[t, k] · Wq[j, k]) · s_x[t] · s_w[j] + b[j], the sum exact, multiplied from the left. Quantiser
and sum are those of ``tsqp.arith``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsqp.arith.product import MAX_INT8_TERMS, DigitKernel
from tsqp.arith.quantise import BLOCK_ELEMENTS, Int8Weights, quantise_block, quantise_rows
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey, LinearGroup, group_keys, group_label, linear_groups
from tsqp.errors import UnsupportedModel
from tsqp.model.quantised import load_quantised_group
from tsqp.progress import Progress, counted, unseen


@dataclass(frozen=True)
class Int8Linear:
    """One linear group: ``wq`` int8 (out_features, in_features), everything else one value per output channel.

    ``dtype`` is what products are handed out in, and inputs made in. ``at_once``: all rows in one go, as on a device,
    where a launch costs more than leaving a cache; otherwise by blocks of rows. The bits are the same.
    """

    group: LinearGroup
    wq: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    bias: torch.Tensor | None
    kernel: DigitKernel
    dtype: torch.dtype
    at_once: bool = False

    def input(self, rows: int) -> torch.Tensor:
        """Uninitialised memory for an input of this group."""
        return torch.empty(rows, self.group.in_features, dtype=self.dtype, device=self.wq.device)

    def product(self, x: torch.Tensor, part: int | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x Wᵀ + b`` for x (T, in_features) of any float dtype: all parts, or one; written to ``out`` if given."""
        first, end = self.group.part_rows(part)
        if out is None:
            out = torch.empty(x.shape[0], end - first, dtype=self.dtype, device=x.device)
        bias = None if self.bias is None else self.bias[first:end]
        if self.at_once:
            own = slice(first, end)
            product_in_one(x, self.wq[own], self.scales[own], self.offsets[own], bias, self.kernel, out)
            return out
        values, scales = quantise_rows(x)
        sums = self.kernel.accumulate(values, self.wq[first:end])
        step = max(1, BLOCK_ELEMENTS // sums.shape[1])  # rows at a time, so that they stay in the cache
        for row in range(0, x.shape[0], step):
            rows = slice(row, row + step)
            out[rows] = rescaled(sums[rows], self.offsets[first:end], scales[rows], self.scales[first:end], bias)
        return out


def product_in_one(
    x: torch.Tensor,
    wq: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: DigitKernel,
    out: torch.Tensor,
) -> None:
    """The whole product as one expression, for a compiler to fuse."""
    x_values, x_scales = quantise_block(x)
    out.copy_(rescaled(kernel.accumulate(x_values, wq), offsets, x_scales, scales, bias))


def rescaled(
    sums: torch.Tensor,
    offsets: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Sums int32 (T, N) with their kernel's offsets (N,) as float32 products."""
    y = (sums - offsets) * row_scales.unsqueeze(1) * column_scales
    return y if bias is None else y + bias


def load_int8_groups(
    checkpoint: Checkpoint,
    kernel: DigitKernel,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = unseen,
) -> dict[GroupKey, Int8Linear]:
    """Read every group and quantise it. Raises CorruptCheckpoint, UnsupportedModel."""
    keys = counted(group_keys(checkpoint.config), "reading and quantising the weights", progress)
    return {key: load_int8_group(checkpoint, key, kernel, dtype, device) for key in keys}


def load_int8_group(
    checkpoint: Checkpoint, key: GroupKey, kernel: DigitKernel, dtype: torch.dtype, device: torch.device
) -> Int8Linear:
    """Read one group and quantise it on the CPU. Raises CorruptCheckpoint, UnsupportedModel."""
    group = linear_groups(checkpoint.config)[key[0]]
    return on_device(group, read_int8_group(checkpoint, key), kernel, dtype, device)


def read_int8_group(checkpoint: Checkpoint, key: GroupKey) -> Int8Weights:
    """``load_quantised_group`` of a group whose sums int32 holds. Raises CorruptCheckpoint, UnsupportedModel."""
    terms = linear_groups(checkpoint.config)[key[0]].in_features
    if terms > MAX_INT8_TERMS:
        raise UnsupportedModel(
            f"int8 sums hold {MAX_INT8_TERMS} terms, {group_label(key)} has {terms}: use a float dtype"
        )
    return load_quantised_group(checkpoint, key)


def on_device(
    group: LinearGroup, read: Int8Weights, kernel: DigitKernel, dtype: torch.dtype, device: torch.device
) -> Int8Linear:
    """A group that was read on the CPU, where it is multiplied by."""
    wq = read.wq.to(device)
    bias = None if read.bias is None else read.bias.to(device)
    scales, at_once = read.scales.to(device), device.type != "cpu"
    return Int8Linear(group, wq, scales, kernel.offsets(wq), bias, kernel, dtype, at_once)
