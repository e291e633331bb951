"""Where token ids become hidden states: here, or on a worker that then knows the text."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from tsqp.trusted.pending import Deferred, Pending
from tsqp.trusted.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.wire.messages import Embed


class Embedding(Protocol):
    """The embedding of a model."""

    def start(self, tokens: torch.Tensor) -> Pending:
        """Ask for the hidden states of int64 token ids (T,): (T, hidden_size)."""


class LocalEmbedding:
    """A look-up on the trusted side in ``table`` (vocab_size, hidden_size)."""

    def __init__(self, table: torch.Tensor, stats: Stats) -> None:
        self._table = table
        self._stats = stats

    def start(self, tokens: torch.Tensor) -> Pending:
        def look_up() -> torch.Tensor:
            with self._stats.product("embedding"):
                return F.embedding(tokens, self._table)

        return Deferred(look_up)


class OpenEmbedding:
    """A look-up on the worker, which receives the token ids."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session

    def start(self, tokens: torch.Tensor) -> Pending:
        rows = tokens.shape[0]
        call = Embed(self._session.next_id(), rows)
        shape = (rows, self._session.spec.hidden_size)
        return self._session.start("embedding", call, [tokens.to(torch.int32)], shape)
