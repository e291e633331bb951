"""What all endpoints share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tsqp.server.console.console import Console
from tsqp.server.errors import ApiError
from tsqp.server.meters import Meters, NoMeters
from tsqp.server.settings import ServerSettings

if TYPE_CHECKING:
    from tsqp.api.async_llm import AsyncLLM
    from tsqp.trusted.text.tokenizer import Tokenizer
    from tsqp.trusted.text.tool_calls import ToolFormat


@dataclass(frozen=True)
class Service:
    """One model and how it is offered.

    ``names``: what clients may call the model; the first is in answers. ``protection``: the mode, which is in a header
    of each answer, and in ``fingerprint``, the ``system_fingerprint`` of the API. ``console``: None where there is no
    page to be shown.
    """

    model: AsyncLLM
    names: tuple[str, ...]
    settings: ServerSettings
    protection: str
    fingerprint: str
    metrics: Meters = field(default_factory=NoMeters)
    console: Console | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """What the model is called in answers."""
        return self.names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.llm.tokenizer

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.model.llm.config.max_positions

    @property
    def vocab_size(self) -> int:
        return self.model.llm.config.vocab_size

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls. Raises OptionError where its template reads no tools."""
        return self.tokenizer.tool_format

    def check_name(self, name: str) -> None:
        """Raises ApiError for a model that is not served here."""
        if name not in self.names:
            raise ApiError(
                404, "no such model is served here: GET /v1/models lists them", param="model", code="model_not_found"
            )
