"""Partitions: which operators run on the worker, and how many calls that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PartitionName = Literal["op", "batched", "linear", "layer"]


@dataclass(frozen=True)
class Partition:
    """Where the operators run.

    ``split_groups``: one call per matrix instead of one per linear group. ``remote_attention``: Q·Kᵀ and
    probabilities·V run on the worker, softmax between them on the trusted side. ``remote_embedding``: the worker
    looks up the embedding, so it receives the token ids. ``whole_layers``: one call per layer, nothing but token ids
    and logits crosses, and the KV cache is the worker's.
    """

    name: PartitionName
    split_groups: bool
    remote_attention: bool
    remote_embedding: bool
    whole_layers: bool = False

    @property
    def calls_per_layer(self) -> int:
        """Calls of one layer for one sequence in one chunk."""
        if self.whole_layers:
            return 1
        return (7 if self.split_groups else 4) + (2 if self.remote_attention else 0)

    def calls_per_pass(self, layers: int, chunks: int = 1) -> int:
        """Calls of one forward pass of one sequence: chunks multiply the per-layer calls only."""
        return chunks * layers * self.calls_per_layer + int(self.remote_embedding) + 1


PARTITIONS: dict[str, Partition] = {
    p.name: p
    for p in (
        # Every linear layer and attention product, one call each; embedding; LM head.
        Partition("op", split_groups=True, remote_attention=True, remote_embedding=True),
        # The same with Q, K, V in one call and gate, up in one call.
        Partition("batched", split_groups=False, remote_attention=True, remote_embedding=True),
        # Linear layers and LM head; attention, KV cache and embedding stay trusted.
        Partition("linear", split_groups=False, remote_attention=False, remote_embedding=False),
        # The whole model state; only the text, its tokens and the sampler stay trusted.
        Partition("layer", split_groups=False, remote_attention=True, remote_embedding=True, whole_layers=True),
    )
}
