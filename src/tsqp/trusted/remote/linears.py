"""Linear layers on a worker that sees their inputs."""

from __future__ import annotations

import torch

from tsqp.config.groups import GroupKey, linear_groups
from tsqp.model.local import call_kind
from tsqp.model.pending import Joined, Pending
from tsqp.trusted.remote.session import WorkerSession
from tsqp.wire.messages import Linear


class OpenLinears:
    """Every product on the worker, which sees the activations in clear and is believed.

    ``split``: one call per matrix, all of a group in flight together, instead of one call per group.
    """

    def __init__(self, session: WorkerSession, *, split: bool) -> None:
        self._session = session
        self._groups = linear_groups(session.config)
        self._split = split

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        return self._session.input((rows, self._groups[key[0]].in_features))

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
