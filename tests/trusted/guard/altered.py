"""A checkpoint with some of its tensors changed, which says that it is still the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tsqp.checkpoint.base import Checkpoint, TextFormat

Change = Callable[[torch.Tensor], torch.Tensor]


class Altered(Checkpoint):
    """``changes``: what happens to a tensor when it is read, by its name; ``text``, ``config``: fields of those."""

    def __init__(
        self,
        original: Checkpoint,
        changes: Mapping[str, Change] | None = None,
        *,
        text: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        super().__init__(replace(original.config, **config), "an altered model")
        self._text = dict(text or {})
        self._original = original
        self._changes = dict(changes or {})

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._original.tensor(name).float().clone()
        return self._changes[name](tensor) if name in self._changes else tensor

    def fingerprint(self) -> str:
        return self._original.fingerprint()

    def text_format(self) -> TextFormat:
        return replace(self._original.text_format(), **self._text)


def with_element(value: float) -> Change:
    """A change of one element."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change
