"""The embedding on a worker that then knows the text."""

from __future__ import annotations

import torch

from tsqp.model.pending import Pending, Private
from tsqp.trusted.remote.session import WorkerSession
from tsqp.wire.messages import Embed


class OpenEmbedding:
    """A look-up on the worker, which receives the token ids."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session

    def start(self, tokens: torch.Tensor) -> Pending:
        rows = tokens.shape[0]
        call = Embed(self._session.next_id(), rows)
        shape = (rows, self._session.config.hidden_size)
        return Private(self._session.start("embedding", call, [tokens.to(torch.int32)], shape))
