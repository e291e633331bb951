"""What a run was asked to be, checked before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from tsqp.errors import OptionError
from tsqp.spec.dtype import DTYPE_NAMES, DtypeName
from tsqp.spec.partition import PARTITIONS, Partition
from tsqp.spec.protection import PROTECTIONS, Protection

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked: a run never differs from its plan.

    ``partition`` is None at ``local``, where nothing is split.
    """

    protection: Protection
    partition: Partition | None
    dtype: DtypeName
    wire_dtype: DtypeName
    prefill_chunk: int

    @classmethod
    def check(cls, *, protection: str, partition: str, dtype: str, wire_dtype: str | None, prefill_chunk: int) -> Plan:
        """Look up every name. Raises OptionError that lists what there is."""
        chosen = _named("protection", protection, PROTECTIONS)
        split = _named("partition", partition, PARTITIONS)
        if chosen.uses_worker and split.name not in chosen.partitions:
            allowed = ", ".join(chosen.partitions)
            raise OptionError(f"protection {chosen.name} cannot use partition {split.name}: use {allowed}")
        if prefill_chunk < 1:
            raise OptionError(f"the prefill chunk must be at least 1 row, not {prefill_chunk}")
        return cls(
            protection=chosen,
            partition=split if chosen.uses_worker else None,
            dtype=_named("dtype", dtype, {name: name for name in DTYPE_NAMES}),
            wire_dtype=_named("wire dtype", wire_dtype or dtype, {name: name for name in DTYPE_NAMES}),
            prefill_chunk=prefill_chunk,
        )


def _named(what: str, name: str, table: dict[str, T]) -> T:
    if name not in table:
        raise OptionError(f"unknown {what} '{name}': use {', '.join(table)}")
    return table[name]
