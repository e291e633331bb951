"""Which adapter a command uses, where it has no requests that could choose."""

from __future__ import annotations

from tsqp.api.adapters import named_paths
from tsqp.api.config import RunConfig
from tsqp.errors import OptionError

_FIELDS = ("compute.lora",)


def one_adapter(run: RunConfig) -> str | None:
    """The name of the one that was given; None for none. Raises OptionError for several."""
    names = tuple(named_paths(run.compute.lora))
    if len(names) > 1:
        raise OptionError("one adapter answers here: give compute.lora once", fields=_FIELDS)
    return names[0] if names else None


def no_adapter(run: RunConfig) -> None:
    """Raises OptionError for a run with adapters."""
    if run.compute.lora:
        raise OptionError(
            "benchmarks measure the model as it is: leave out compute.lora, or use python -m benchmarks.lora",
            fields=_FIELDS,
        )
