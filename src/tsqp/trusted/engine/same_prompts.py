"""Requests of one scope that have the same prompt, such as several choices: one computes it, the others copy it.

The first one that has not ended computes the prompt, and the others wait until it has. So whoever waits here waits for
a request that does not, and that may be admitted like any other (docs/serving.md §5).

Covers: nothing is shared with another scope, and nobody waits for one (tests/trusted/engine/test_same_prompts.py).
"""

from __future__ import annotations

from collections.abc import Hashable

from tsqp.trusted.engine.request import Beginning, Request, ReusableCache


class SamePrompts:
    """Those that have not ended, by scope and prompt, in the order of arrival."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, dict[int, Request]] = {}
        self._keys: dict[int, Hashable] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, scope: Hashable, request: Request) -> None:
        """A request that has arrived, of this scope."""
        key = scope, tuple(request.tokens)
        self._keys[request.id] = key
        self._groups.setdefault(key, {})[request.id] = request

    def remove(self, request: Request) -> None:
        """A request has ended. One that was never added is left alone."""
        key = self._keys.pop(request.id, None)
        if key is None:
            return
        group = self._groups[key]
        del group[request.id]
        if not group:
            del self._groups[key]

    def held_back(self, request: Request) -> bool:
        """Whether a waiting request has to wait for another one to compute its prompt."""
        group = self._group(request)
        return next(iter(group), request.id) != request.id and self.beginning(request) is None

    def beginning(self, request: Request) -> Beginning | None:
        """What a waiting request begins with, once another one has computed all of the prompt but its last token.

        That one is computed for each, as its logits are wanted.
        """
        for other in self._group(request).values():
            if other is not request and other.computed >= request.prompt_length - 1:
                held = other.beginning
                source = other.cache if held is None else held.source  # a copy of what is not copied yet
                if isinstance(source, ReusableCache):
                    most = min(request.prompt_length, len(request.tokens) - 1)
                    return Beginning(source, min(other.computed, most))
        return None

    def _group(self, request: Request) -> dict[int, Request]:
        return self._groups.get(self._keys.get(request.id), {})
