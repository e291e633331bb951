"""One model's weights over several devices: a slice of every linear group on each, everything else on the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.arith.quantise import Int8Weights
from tsqp.arith.self_test import pick_kernel
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import ComputeDtype, PlainDtype, float_dtype
from tsqp.config.groups import GroupKey, GroupName, cut, group_keys, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, whole
from tsqp.errors import OptionError
from tsqp.model.decoder_layers import Norms
from tsqp.model.int8 import on_device, read_int8_group
from tsqp.model.linear import LinearProduct, LinearWeights, read_group
from tsqp.model.quantised import GroupDigests, load_quantised_group
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.many import ManyDevices
from tsqp.untrusted.paths.field import FieldWorkerWeights, compile_loops
from tsqp.untrusted.paths.slices import Slice, slices
from tsqp.wire.payload import TORCH_DTYPES


@dataclass(frozen=True)
class ManyWeights:
    """``parts`` are the weights of each device, in order, all of one path. ``device`` names all devices."""

    device: str
    parts: Sequence[ModelWeights] | Sequence[FieldWorkerWeights]

    @property
    def config(self) -> ModelConfig:
        return self.parts[0].config

    @property
    def compute(self) -> ComputeDtype:
        return self.parts[0].compute

    @property
    def digests(self) -> dict[GroupName, str]:
        """Those of all devices' slices together, on the field path."""
        first = self.parts[0]
        return dict(first.digests) if isinstance(first, FieldWorkerWeights) else {}

    @property
    def shard(self) -> Shard:
        """What all devices hold together: all of the model, except on the field path."""
        first = self.parts[0]
        return first.shard if isinstance(first, FieldWorkerWeights) else whole(first.config)


def check_features(config: ModelConfig, devices: int, shard: Shard | None = None) -> None:
    """Raises OptionError for more devices than a group, or a shard's slice of one, has output features."""
    shard = shard or whole(config)
    least = min(shard.groups(config), key=shard.width)
    if shard.width(least) < devices:
        raise OptionError(
            f"{devices} devices cannot share group {least.name} of this model, which has {shard.width(least)} output "
            "features: use fewer"
        )


def load_field(
    checkpoint: Checkpoint, devices: ManyDevices, kernel: DigitKernel | None = None, shard: Shard | None = None
) -> ManyWeights:
    """The field path: each group, or a shard's slice of it, is read and digested once. Raises CheckpointError."""
    kernels = _kernels(devices, kernel)
    shard = shard or whole(checkpoint.config)
    digests = GroupDigests(shard.first)
    groups: list[dict[GroupKey, FieldWeights]] = [{} for _ in kernels]
    for key in shard.keys(checkpoint.config):
        wq = load_quantised_group(checkpoint, key, shard).wq
        digests.add(key, wq)
        for device, own in enumerate(slices(len(wq), len(groups))):
            with devices.using(device) as backend:
                groups[device][key] = backend.field_weights(_rows(wq, own), kernels[device])
    compile_loops(BlockedKernel())  # those of a dealer's keys
    found = digests.hexdigests()
    places = [backend.device for backend in devices.backends]
    parts = [
        FieldWorkerWeights(checkpoint.config, place, own, found, shard)
        for place, own in zip(places, groups, strict=True)
    ]
    return ManyWeights(devices.name, parts)


def load_plain(
    checkpoint: Checkpoint, compute: PlainDtype, devices: ManyDevices, kernel: DigitKernel | None = None
) -> ManyWeights:
    """A float path, or int8: one group after another is read on the host and sent to the devices in slices.

    The embedding and norms are on the first device, whose operators alone look at them. Raises CheckpointError.
    """
    config, dtype = checkpoint.config, TORCH_DTYPES[float_dtype(compute)]
    kernels = _kernels(devices, kernel) if compute == "int8" else []
    places = [backend.device for backend in devices.backends]
    groups: list[dict[GroupKey, LinearProduct]] = [{} for _ in places]
    embedding = None
    for key in group_keys(config):
        if compute == "int8":
            _share_int8(read_int8_group(checkpoint, key), key, config, dtype, devices, kernels, groups)
            continue
        weight, bias = read_group(checkpoint, key, dtype)
        _share_floats(weight, bias, key, config, devices, groups)
        if key[0] == "lm_head" and config.tied_embeddings:
            embedding = weight  # only slices of it are on the devices
    with devices.using(0) as backend:
        table = checkpoint.tensor("model.embed_tokens.weight") if embedding is None else embedding
        table = table.to(backend.device, dtype, copy=True)  # what is mapped from a file, others may change
        norms = Norms.load(checkpoint, dtype, backend.device)
    parts = [
        ModelWeights(config, compute, dtype, place, own, table, norms)
        for place, own in zip(places, groups, strict=True)
    ]
    return ManyWeights(devices.name, parts)


def _kernels(devices: ManyDevices, kernel: DigitKernel | None) -> list[DigitKernel]:
    """That of each device, tested on each: they need not be alike."""
    return [kernel or pick_kernel(backend.device) for backend in devices.backends]


def _share_floats(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key: GroupKey,
    config: ModelConfig,
    devices: ManyDevices,
    groups: list[dict[GroupKey, LinearProduct]],
) -> None:
    group = linear_groups(config)[key[0]]
    for device, own in enumerate(slices(len(weight), len(groups))):
        with devices.using(device) as backend:
            added = None if bias is None else _rows(bias, own).to(backend.device)
            here = _rows(weight, own).to(backend.device)
            groups[device][key] = LinearWeights(cut(group, *own), here, added, loops=False)


def _share_int8(
    read: Int8Weights,
    key: GroupKey,
    config: ModelConfig,
    dtype: torch.dtype,
    devices: ManyDevices,
    kernels: list[DigitKernel],
    groups: list[dict[GroupKey, LinearProduct]],
) -> None:
    group = linear_groups(config)[key[0]]
    for device, own in enumerate(slices(len(read.wq), len(groups))):
        bias = None if read.bias is None else _rows(read.bias, own)
        part = Int8Weights(_rows(read.wq, own), _rows(read.scales, own), bias)
        with devices.using(device) as backend:
            groups[device][key] = on_device(cut(group, *own), part, kernels[device], dtype, backend.device)


def _rows(whole: torch.Tensor, own: Slice) -> torch.Tensor:
    return whole[own.first : own.end]
