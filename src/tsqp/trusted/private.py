"""What the private modes load: every linear group as the guard holds it, and digests of all that was loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.arith.quantise import Int8Weights
from tsqp.arith.self_test import pick_kernel
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey, GroupName, group_keys
from tsqp.config.shard import Shard
from tsqp.config.tiling import Tiling
from tsqp.errors import CorruptCheckpoint, model_closed
from tsqp.model.decoder_layers import Norms
from tsqp.model.quantised import GroupDigests, ShardDigests, load_quantised_group
from tsqp.progress import Progress, counted, unseen
from tsqp.trusted.dealers import Dealers
from tsqp.trusted.decode_step import DecodeStep
from tsqp.trusted.filler import PadFiller
from tsqp.trusted.guard.kernels import project, quantise_and_mask, verify_and_unmask
from tsqp.trusted.guard.linears import CheckedLinears, MaskedLinears
from tsqp.trusted.guard.weights import GuardedGroup

READING = "reading and quantising the weights"


@dataclass(frozen=True)
class PrivateModel:
    """``groups``: what the guard holds. ``digests``: SHA-256 of each group's 8-bit weights, which a worker must have.

    ``digest``: SHA-256 of those and of everything else that this side loads; see ``ModelDigest``. ``kernel`` multiplies
    pads, where this side does. ``tiling``: what several workers have of it, whose slices are checked one by one, and
    ``shard_digests`` what each has to have.
    """

    groups: Mapping[GroupKey, GuardedGroup]
    digests: Mapping[GroupName, str]
    digest: str
    kernel: DigitKernel
    tiling: Tiling | None = None
    shard_digests: Mapping[Shard, Mapping[GroupName, str]] = field(default_factory=dict)

    def renewed(
        self, checkpoint: Checkpoint, stopped: Callable[[], bool], tiling: Tiling | None = None
    ) -> PrivateModel:
        """The same model with check vectors that no connection has had, for workers of ``tiling``, or for one worker.

        They need the 8-bit weights. Where this side has let go of those, they are read and quantised again. Raises
        CorruptCheckpoint where they are others by now; ChannelClosed where ``stopped``, which is asked before each
        group: the largest of them takes a second or two.
        """
        digests, groups = GroupDigests(), dict[GroupKey, GuardedGroup]()
        divided = ShardDigests(() if tiling is None or tiling == self.tiling else tiling.shards, checkpoint.config)
        for key, old in self.groups.items():
            if stopped():
                raise model_closed()
            keeps = old.weights is not None
            wq = load_quantised_group(checkpoint, key).wq if old.weights is None else old.weights.wq
            if not keeps:
                digests.add(key, wq)
            divided.add(key, wq)
            # Copies: an array that is a tensor's, in a tensor, in an array ... would keep every model that there was.
            scales, bias, checks = torch.tensor(old.scales), torch.tensor(old.bias), len(old.check_vectors)
            kernel, slices = self.kernel if keeps else None, _slices(tiling, key, wq)
            weights = Int8Weights(wq, scales, bias)
            groups[key] = GuardedGroup.of(key, weights, kernel, checks=checks, slices=slices)
        if digests.hexdigests() not in ({}, self.digests):
            raise CorruptCheckpoint("the weights on the disk have changed since they were read: open the model anew")
        shard_digests = self.shard_digests if tiling == self.tiling else divided.hexdigests()
        return replace(self, groups=groups, tiling=tiling, shard_digests=shard_digests)

    def forget(self) -> None:
        """Overwrite all check vectors."""
        for group in self.groups.values():
            group.forget()


@dataclass(frozen=True)
class Guard:
    """The guard of one session: what it has done, and its pads.

    ``filler`` and ``dealers`` are None where there are none. ``earlier``: what the sessions before have counted.
    """

    linears: CheckedLinears
    check_vectors: int
    model_digest: str
    filler: PadFiller | None
    dealers: Dealers | None
    step: DecodeStep | None = None  # which has memory of the guard
    earlier: Mapping[str, int] = field(default_factory=dict)

    def counted(self) -> dict[str, int]:
        """Of this session and those before: products checked; rows of pads used, and those made on the spot."""
        counts = {"products_checked": self.linears.products_checked}
        if isinstance(self.linears, MaskedLinears):
            counts |= {"pads_used": self.linears.pads.used, "pads_missed": self.linears.pads.missed}
        return {name: count + self.earlier.get(name, 0) for name, count in counts.items()}

    def failed_pads(self, error: Exception) -> bool:
        """Whether this came of making pads, in any thread: then it is not about the worker."""
        if self.dealers is not None and self.dealers.ended_by(error):  # before the pool has heard of it
            return True
        return isinstance(self.linears, MaskedLinears) and any(one is error for one in self.linears.pads.failures)

    def report(self) -> dict[str, object]:
        """The statistics of the guard: products checked, rows of pads used, tokens whose pads are ready."""
        figures: dict[str, object] = {
            **self.counted(),
            # A wrong product goes unnoticed, in the whole session, with probability 2 to minus this.
            "soundness_bits": round(self.check_vectors * math.log2(P), 2),
            "model_digest": self.model_digest,
        }
        if self.filler is not None:
            figures |= {
                "pads_ahead": self.filler.ahead,
                "pads_ready": self.filler.ready(answer=True),
                "pads_ready_prompt": self.filler.ready(answer=False),
            }
        return figures

    def close(self) -> None:
        """Destroy pads and check vectors, and leave the dealer. Closing twice is allowed."""
        with ExitStack() as closing:  # from the last to the first, whatever happens on the way
            if self.dealers is not None:
                closing.callback(self.dealers.close)
            if self.filler is not None:
                closing.callback(self.filler.close)  # may wait for a dealer
            self.linears.close()
            if self.step is not None:
                self.step.close()


def load_private_model(
    checkpoint: Checkpoint,
    embedding: torch.Tensor,
    norms: Norms,
    *,
    checks: int,
    keep_weights: bool,
    progress: Progress = unseen,
    tiling: Tiling | None = None,
) -> PrivateModel:
    """Read and quantise every group; ``keep_weights``: whether this side is to multiply by them.

    ``tiling``: of the workers that are expected. For others than these the weights are needed again. Raises
    CorruptCheckpoint, UnsupportedModel.
    """
    kernel = pick_kernel(torch.device("cpu"))
    digests, divided = GroupDigests(), ShardDigests(() if tiling is None else tiling.shards, checkpoint.config)
    whole = ModelDigest(checkpoint)
    groups: dict[GroupKey, GuardedGroup] = {}
    for key in counted(group_keys(checkpoint.config), READING, progress):
        weights = load_quantised_group(checkpoint, key)
        digests.add(key, weights.wq)
        whole.add(f"{key} scales", weights.scales)
        whole.add(f"{key} bias", weights.bias)
        divided.add(key, weights.wq)
        slices = _slices(tiling, key, weights.wq)
        groups[key] = GuardedGroup.of(key, weights, kernel if keep_weights else None, checks=checks, slices=slices)
    for index, layer in enumerate(norms.layers):
        for name, weight in vars(layer).items():
            whole.add(f"layer {index} norm {name}", weight)
    whole.add("final norm", norms.final)
    whole.add("embedding", embedding)
    own = digests.hexdigests()
    return PrivateModel(groups, own, whole.hexdigest(own), kernel, tiling, divided.hexdigests())


def _slices(tiling: Tiling | None, key: GroupKey, wq: torch.Tensor) -> Sequence[int]:
    """Where the slices of a group end, but for the last one: see ``GuardedGroup.of``."""
    return () if tiling is None else tiling.bounds(key, len(wq))[1:-1]


class ModelDigest:
    """SHA-256 over all that this side loads: shape, tokenizer, chat template, every tensor with its name and type."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        said = {"spec": asdict(checkpoint.config), "text": asdict(checkpoint.text_format())}
        self._hash = hashlib.sha256(json.dumps(said, sort_keys=True).encode())

    def add(self, name: str, tensor: torch.Tensor | None) -> None:
        """Take one tensor, or that there is none."""
        if tensor is None:
            self._hash.update(f"\n{name}: none\n".encode())
            return
        self._hash.update(f"\n{name}: {tensor.dtype} {list(tensor.shape)}\n".encode())
        self._hash.update(tensor.contiguous().view(torch.uint8).numpy().data)

    def hexdigest(self, groups: Mapping[GroupName, str]) -> str:
        """With the digests of the 8-bit weights: 64 hex digits."""
        self._hash.update(json.dumps(groups, sort_keys=True).encode())
        return self._hash.hexdigest()


def compile_loops(*, masked: bool) -> None:
    """Have numba compile the guard's loops now, by one tiny product, so that no call waits for it."""
    like, item = torch.zeros(2, 8), np.uint32 if masked else np.int16
    wide, narrow = np.zeros((2, 8), np.uint32), np.zeros((2, 1), np.uint32)
    ones, verdicts = np.ones(8, np.float32), np.zeros(2, np.uint8)
    pads = wide.copy() if masked else np.zeros((2, 0), np.uint32)
    line = np.frombuffer(bytearray(16 * np.dtype(item).itemsize), item).reshape(2, 8)
    quantise_and_mask(like.numpy(), np.float32(1), wide[:1], masked, pads, line, ones[:2], narrow, verdicts, 0, 2)
    check = wide[:1], narrow, np.array([0, 8]), masked, pads, (ones[:2], ones, ones)
    verify_and_unmask(wide.copy(), *check, like.numpy(), verdicts, 0, 2)
    if masked:
        project(wide, wide[:1], narrow, 0, 2)
        weights = FieldWeights.of(torch.ones(8, 8, dtype=torch.int8), BlockedKernel())  # the loops are those of any
        weights.product(torch.zeros(2, 8, dtype=torch.int32), 4, out=torch.zeros(2, 16, dtype=torch.int32)[:, :8])
