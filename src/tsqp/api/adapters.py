"""The adapters of a run: from ``[NAME=]PATH`` to what the layers add, and the digest that covers them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsqp.errors import OptionError

if TYPE_CHECKING:
    from tsqp.checkpoint.adapter import LayerPart, LowRank
    from tsqp.config.model import ModelConfig
    from tsqp.model.adapters import Adapters
    from tsqp.model.meter import Meter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_FIELD = ("compute.lora",)


@dataclass(frozen=True)
class LoadedAdapters:
    """Adapters that fit the model, by name. ``digests``: the SHA-256 of each, 64 hex digits."""

    digests: Mapping[str, str]
    parts: Mapping[str, Mapping[LayerPart, LowRank]]

    def for_layers(self, config: ModelConfig, meter: Meter, *, own_products: bool) -> Adapters | None:
        """As ``DecoderLayers`` takes them; see ``Adapters``."""
        if not self.parts:
            return None
        from tsqp.model.adapters import Adapters

        return Adapters(config, self.parts, meter, own_products=own_products)

    def without_numbers(self) -> LoadedAdapters:
        """Names and digests: whoever computes has a copy of the rest."""
        return LoadedAdapters(self.digests, {})

    def run_digest(self, model_digest: str) -> str:
        """SHA-256 over the model's digest and each adapter's name and digest; the model's own without adapters."""
        if not self.digests:
            return model_digest
        said = {"model": model_digest, "adapters": dict(self.digests)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


NO_ADAPTERS = LoadedAdapters({}, {})


def named_paths(given: Sequence[str]) -> dict[str, Path]:
    """Where each adapter is, by its name. Raises OptionError for what is no name, and for one name twice."""
    found: dict[str, Path] = {}
    for text in given:
        before, equals, after = text.partition("=")
        named = bool(equals) and "/" not in before  # a path may have a sign of equality too
        rest = after if named else text
        path = Path(rest.replace("\0", "")).expanduser()
        name = before if named else path.resolve().name
        if not rest or "\0" in rest or not _NAME.fullmatch(name):
            raise OptionError(
                "compute.lora takes [NAME=]PATH, and NAME has 1 to 64 letters, digits, dots, hyphens and underscores, "
                "the first a letter or a digit",
                fields=_FIELD,
            )
        if name in found:
            raise OptionError(f"compute.lora names {name} twice: give one of them another NAME", fields=_FIELD)
        found[name] = path
    return found


def load_adapters(given: Sequence[str], config: ModelConfig) -> LoadedAdapters:
    """Read adapters for a model; torch has to be ready. Raises OptionError and CheckpointError."""
    paths = named_paths(given)
    if not paths:
        return NO_ADAPTERS
    from tsqp.checkpoint.adapter import Adapter

    adapters = {name: Adapter(path) for name, path in paths.items()}
    return LoadedAdapters(
        {name: adapter.digest for name, adapter in adapters.items()},
        {name: adapter.parts(config) for name, adapter in adapters.items()},
    )
