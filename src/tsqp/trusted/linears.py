"""Where the decoder's linear products are computed: here, or on a worker that sees their inputs."""

from __future__ import annotations

from typing import Protocol

import torch

from tsqp.checkpoint.base import Checkpoint
from tsqp.model.linear import GroupKey, LinearWeights, group_keys, load_group
from tsqp.spec.groups import linear_groups
from tsqp.trusted.pending import Deferred, Joined, Pending
from tsqp.trusted.session import WorkerSession
from tsqp.trusted.stats import CallKind, Stats
from tsqp.wire.messages import Linear


class Linears(Protocol):
    """All linear layers of a model."""

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        """Ask for ``x Wᵀ + b`` of one group: x (T, in_features) to (T, out_features), parts concatenated.

        ``x`` must not change until the product is there.
        """


def call_kind(key: GroupKey) -> CallKind:
    """The statistics row of a group."""
    return "lm_head" if key[0] == "lm_head" else "linear"


class LocalLinears:
    """Every product on the trusted side: nothing leaves it."""

    def __init__(self, weights: dict[GroupKey, LinearWeights], stats: Stats) -> None:
        self._weights = weights
        self._stats = stats

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, stats: Stats) -> LocalLinears:
        """Read every group of a checkpoint."""
        return cls({key: load_group(checkpoint, key, dtype) for key in group_keys(checkpoint.spec)}, stats)

    @property
    def head_weight(self) -> torch.Tensor:
        """The LM head (vocab_size, hidden_size), which tied models also use as the embedding."""
        return self._weights["lm_head", None].weight

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        def product() -> torch.Tensor:
            with self._stats.product(call_kind(key)):
                return self._weights[key].product(x)

        return Deferred(product)


class OpenLinears:
    """Every product on the worker, which sees the activations in clear and is believed.

    ``split``: one call per matrix, all of a group in flight together, instead of one call per group.
    """

    def __init__(self, session: WorkerSession, *, split: bool) -> None:
        self._session = session
        self._groups = linear_groups(session.spec)
        self._split = split

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        parts = len(self._groups[key[0]].parts)
        if not self._split or parts == 1:
            return self._call(key, None, x)
        return Joined([self._call(key, part, x) for part in range(parts)])

    def _call(self, key: GroupKey, part: int | None, x: torch.Tensor) -> Pending:
        name, layer = key
        rows = x.shape[0]
        first, end = self._groups[name].part_rows(part)
        call = Linear(self._session.next_id(), name, layer, part, rows)
        return self._session.start(call_kind(key), call, [x], (rows, end - first))
