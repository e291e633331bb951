"""Protections: what the worker may learn. Stated by the caller, never inferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsqp.config.partition import PartitionName

ProtectionName = Literal["masked", "verified", "open", "local"]


@dataclass(frozen=True)
class Protection:
    """``partitions`` are those the protection can be combined with; none means that no worker is used.

    ``checked``: every product is verified before it is used. ``masked``: the worker sees uniform noise.
    """

    name: ProtectionName
    worker_sees: str
    partitions: tuple[PartitionName, ...]
    checked: bool = False
    masked: bool = False

    @property
    def uses_worker(self) -> bool:
        return bool(self.partitions)


PROTECTIONS: dict[str, Protection] = {
    p.name: p
    for p in (
        Protection(
            "open",
            "the activations in clear: prompts can be recovered from them",
            ("op", "batched", "linear", "layer"),
        ),
        Protection(
            "verified",
            "the activations in clear, as integers; every product is checked before it is used",
            ("linear",),
            checked=True,
        ),
        Protection(
            "masked",
            "uniform noise; every product is checked before it is used",
            ("linear",),
            checked=True,
            masked=True,
        ),
        Protection("local", "nothing: there is no worker, everything runs in this process", ()),
    )
}
