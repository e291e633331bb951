"""Partitions: which operators run on the worker, and how many calls that costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """Where the operators run.

    ``split_groups``: one call per matrix instead of one per linear group. ``remote_attention``: Q·Kᵀ and
    probabilities·V run on the worker, softmax between them on the trusted side. ``remote_embedding``: the worker
    looks up the embedding, so it receives the token ids.
    """

    name: str
    split_groups: bool
    remote_attention: bool
    remote_embedding: bool
    worker_runs: str

    @property
    def calls_per_layer(self) -> int:
        """Calls of one layer for one sequence in one chunk."""
        return (7 if self.split_groups else 4) + (2 if self.remote_attention else 0)

    def calls_per_pass(self, layers: int, chunks: int = 1) -> int:
        """Calls of one forward pass of one sequence: chunks multiply the per-layer calls only."""
        return chunks * layers * self.calls_per_layer + int(self.remote_embedding) + 1


PARTITIONS: dict[str, Partition] = {
    p.name: p
    for p in (
        Partition(
            "op",
            True,
            True,
            True,
            "every linear layer and attention product, one call each; embedding; LM head",
        ),
        Partition("batched", False, True, True, "the same with Q, K, V in one call and gate, up in one call"),
        Partition("linear", False, False, False, "linear layers and LM head; attention and embedding stay trusted"),
    )
}
