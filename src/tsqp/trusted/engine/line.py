"""What an engine asks for its decoders, where the one it has can lose its worker."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tsqp.config.model import ModelConfig
from tsqp.model.batch import Batch
from tsqp.model.pending import Steps


class PassDecoder(Protocol):
    """What the engine needs of a decoder; sequences are known by caches that the decoder makes.

    ``max_sequences`` of one pass, where a decoder has such a bound. ``caches_on_worker``, where it has that: they are
    lost with the decoder. Otherwise the caches of one decoder are good for the next one of the same line.
    """

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self) -> Any: ...

    def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]: ...


class Line(Protocol):
    """Decoders of one model, one after another, each good for one session with a worker. One thread asks at a time."""

    def decoder(self) -> PassDecoder:
        """One whose worker is there, as far as is known. Waits for one; raises what ends all requests."""

    def look(self) -> bool:
        """Whether there is no worker and one may be had; also one that has gone while nothing was asked of it."""

    def passed(self) -> None:
        """A pass was completed."""

    def gave_up(self, error: BaseException) -> None:
        """A pass has ended with ``error``: products that it has asked for are waited for by nobody."""

    def mends(self, error: Exception) -> bool:
        """Whether a pass that has failed with ``error`` may be asked for again, of the next decoder."""
