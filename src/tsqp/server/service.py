"""What all endpoints share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tsqp.server.attestation import Attester
from tsqp.server.console.console import Console
from tsqp.server.errors import ApiError
from tsqp.server.meters import Meters, NoMeters
from tsqp.server.settings import ServerSettings

if TYPE_CHECKING:
    from tsqp.api.async_llm import AsyncLLM
    from tsqp.server.receipts import Receipts
    from tsqp.trusted.text.tokenizer import Tokenizer
    from tsqp.trusted.text.tool_calls import ToolFormat

MOST_NAMES = 8  # in an error


@dataclass(frozen=True)
class Service:
    """One model and how it is offered.

    ``names``: what clients may call the model; the first is in answers. ``adapters``: names of adapters; clients call
    the model with one ``NAME:ADAPTER``, by any of its names. ``protection``: the mode, which is in a header
    of each answer, and in ``fingerprint``, the ``system_fingerprint`` of the API. ``console``: None where there is no
    page to be shown. ``attester``, ``receipts``: None where no evidence is given.
    """

    model: AsyncLLM
    names: tuple[str, ...]
    settings: ServerSettings
    protection: str
    fingerprint: str
    metrics: Meters = field(default_factory=NoMeters)
    console: Console | None = None
    attester: Attester | None = None
    receipts: Receipts | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the model is called in answers."""
        return self.names[0]

    @cached_property
    def parents(self) -> dict[str, tuple[str | None, str | None]]:
        """Every name that clients may use: the name without an adapter, where there is one, and the adapter."""
        plain: dict[str, tuple[str | None, str | None]] = dict.fromkeys(self.names, (None, None))
        return plain | {f"{name}:{one}": (name, one) for name in self.names for one in self.adapters}

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.llm.tokenizer

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.model.llm.config.max_positions

    def room(self, choices: int = 1) -> int:
        """The most tokens of a prompt and its answer where so many are asked for at once.

        The context; or less, where each needs a promise of pads for all of its tokens but the last.
        """
        promised = self.model.llm.most_promised
        return self.context if promised is None else min(self.context, promised // choices + 1)

    @property
    def vocab_size(self) -> int:
        return self.model.llm.config.vocab_size

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls. Raises OptionError where its template reads no tools."""
        return self.tokenizer.tool_format

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a client has chosen by a name. Raises ApiError for a model that is not served here."""
        if name not in self.parents:
            known = ", ".join([*self.parents][:MOST_NAMES]) + (", …" if len(self.parents) > MOST_NAMES else "")
            text = f"no such model is served here: GET /v1/models lists them ({known})"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.parents[name][1]

    def name_in_answers(self, name: str) -> str:
        """What the model with the adapter that was chosen is called in answers. Raises as ``adapter_of``."""
        adapter = self.adapter_of(name)
        return self.name if adapter is None else f"{self.name}:{adapter}"
