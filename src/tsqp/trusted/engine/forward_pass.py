"""One forward pass over rows of several requests: its batch, and whose its logits are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tsqp.model.batch import Batch
from tsqp.trusted.engine.request import Output, Request
from tsqp.trusted.engine.scheduler import Shares
from tsqp.trusted.stats import Stats


class ForwardPass:
    """The next rows of requests, noted before the pass moves the requests on.

    ``decode_rows``: how many of the rows are decode steps. ``prefill_rows``: of each other request, how many it has.
    """

    def __init__(self, shares: Shares, *, same_bits: bool) -> None:
        self._shares = shares
        self._reading = {request: request.computed for request in shares if request.reads_prompt}
        self.prefill_rows = [rows for request, rows in shares.items() if not request.decoding]
        self.decode_rows = len(shares) - len(self.prefill_rows)
        caches: list[Any] = [request.cache for request in shares]
        self.batch = Batch(
            [request.tokens[request.computed :][:rows] for request, rows in shares.items()],
            caches,
            sampled=[rows == request.rest for request, rows in shares.items()],
            first_steps=[request.prompt_length for request in shares] if same_bits else None,
            whole=[request.reads_prompt for request in shares],
            call_by_call=any(request.tap is not None for request in shares),
            adapters=[request.adapter for request in shares],
        )

    def tapped(self) -> AbstractContextManager[None]:
        """The tap of the pass listens, where it has one."""
        if all(request.tap is None for request in self._shares):
            return nullcontext()
        (request,) = self._shares  # a crash rather than a row of another: the scheduler plans no such pass
        return nullcontext() if request.tap is None else request.tap.listening(request.computed)

    def take(self, logits: torch.Tensor, given: dict[Request, Output], stats: Stats) -> None:
        """What each request makes of its rows of logits (n, vocab_size); an interruption keeps those before it."""
        are_finite = finite_rows(logits)
        at = 0
        for request, count in self._shares.items():
            first = self._reading.get(request)
            wanted = int(not request.rest) if first is None else count
            if wanted:
                output = request.take(logits[at : at + wanted], all(are_finite[at : at + wanted]), first)
                at += wanted
                if output is not None:
                    given[request] = output
                    stats.new_tokens += int(output.token is not None)


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """Of each row of logits (n, vocab_size) whether all are numbers. By greatest and least: 1/20 of looking at each."""
    extremes = torch.stack((logits.amax(dim=-1), logits.amin(dim=-1)))  # not a number where one of the row is not
    return torch.isfinite(extremes).all(dim=0).tolist() if len(logits) else []
