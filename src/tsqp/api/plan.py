"""What a run was asked to be, checked before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from tsqp.config.dtype import PLAIN_DTYPES, WIRE_DTYPES, ComputeDtype, DtypeName, WireDtype, float_dtype
from tsqp.config.partition import PARTITIONS, Partition
from tsqp.config.protection import PROTECTIONS, Protection
from tsqp.errors import OptionError

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked: a run never differs from its plan.

    ``partition`` is None at ``local``, where nothing is split. ``dtype`` is what this side computes in,
    ``worker_dtype`` what the worker is asked to compute in, ``wire_dtype`` what floats cross the line as. ``threads``:
    None is torch's own choice.
    """

    protection: Protection
    partition: Partition | None
    dtype: DtypeName
    worker_dtype: ComputeDtype
    wire_dtype: WireDtype
    prefill_chunk: int
    micro_batches: int
    compiled_kernels: bool
    threads: int | None
    deadline_s: float

    @property
    def crossing(self) -> str | None:
        """What inputs of products cross the line as: floats, or integers in the private modes; None at ``local``."""
        if self.partition is None:
            return None
        if self.protection.checked:
            return "uint32" if self.protection.masked else "int16"
        return self.wire_dtype

    @classmethod
    def check(
        cls,
        *,
        protection: str,
        partition: str,
        dtype: str,
        wire_dtype: str | None,
        prefill_chunk: int,
        stored: DtypeName = "bfloat16",
        micro_batches: int = 1,
        compiled_kernels: bool = True,
        threads: int | None = None,
        deadline_s: float = 300.0,
    ) -> Plan:
        """Look up every name and hold every number against its range. Raises OptionError that says what is possible.

        ``dtype`` may be ``auto``: ``stored``, except in the private modes, which compute in float32 on this side.
        """
        chosen = _named("protection", protection, PROTECTIONS)
        split = _named("partition", partition, PARTITIONS)
        if chosen.uses_worker and split.name not in chosen.partitions:
            allowed = ", ".join(chosen.partitions)
            raise OptionError(f"protection {chosen.name} cannot use partition {split.name}: use {allowed}")
        if prefill_chunk < 1:
            raise OptionError(f"the prefill chunk must be at least 1 row, not {prefill_chunk}")
        if micro_batches < 1:
            raise OptionError(f"there must be at least 1 micro-batch, not {micro_batches}")
        if threads is not None and threads < 1:
            raise OptionError(f"threads must be at least 1, not {threads}")
        if not 0 < deadline_s < math.inf:
            raise OptionError(f"the deadline must be a positive number of seconds, not {deadline_s}")
        asked = _named("dtype", stored if dtype == "auto" else dtype, {name: name for name in PLAIN_DTYPES})
        if chosen.checked:
            _refuse_in_private(chosen, dtype, wire_dtype, compiled_kernels)
        if asked == "int8" and not chosen.uses_worker:
            raise OptionError(f"dtype int8 is a worker's, and protection {chosen.name} uses no worker: use bfloat16")
        compute: ComputeDtype = "field" if chosen.checked else asked  # what is checked is products mod p
        here = float_dtype(compute)
        return cls(
            protection=chosen,
            partition=split if chosen.uses_worker else None,
            dtype=here,
            worker_dtype=compute,
            wire_dtype=_named("wire dtype", wire_dtype or here, {name: name for name in WIRE_DTYPES}),
            prefill_chunk=prefill_chunk,
            micro_batches=micro_batches,
            compiled_kernels=compiled_kernels,
            threads=threads,
            deadline_s=deadline_s,
        )


def _refuse_in_private(chosen: Protection, dtype: str, wire_dtype: str | None, compiled_kernels: bool) -> None:
    """Raises OptionError for numbers and loops that a private mode does not have."""
    here = f"protection {chosen.name} computes in float32 on this side and in integers mod p on the worker"
    if dtype not in ("auto", "float32"):
        raise OptionError(f"{here}: leave out dtype {dtype}")
    if wire_dtype is not None:
        raise OptionError(f"{here}: leave out wire_dtype {wire_dtype}")
    if not compiled_kernels:
        raise OptionError(f"protection {chosen.name} needs its compiled loops: leave out compiled_kernels off")


def refuse_unused(why: str, given: Mapping[str, object]) -> None:
    """Raises OptionError that names what was given although it would play no part. None and False are not given."""
    unused = [name for name, value in given.items() if value is not None and value is not False]
    if unused:
        raise OptionError(f"{why}: leave out {', '.join(unused)}")


def _named(what: str, name: str, table: dict[str, T]) -> T:
    if name not in table:
        raise OptionError(f"unknown {what} '{name}': use {', '.join(table)}")
    return table[name]
