"""What a run was asked to be, checked and looked up, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.api.config import ObliviousWay, RunConfig
from tsqp.api.rules import check
from tsqp.config.dtype import ComputeDtype, DtypeName, KVDtype, WireDtype, float_dtype
from tsqp.config.partition import PARTITIONS, Partition
from tsqp.config.protection import PROTECTIONS, Protection
from tsqp.tee.detection import SEV_SNP, detect_tee


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked: a run never differs from its plan.

    ``run``: as it was asked for. ``partition`` is None at ``local``, where nothing is split. ``dtype`` is what this
    side computes in, ``linear_dtype`` what linear layers are computed in, on whichever side has them, ``wire_dtype``
    what floats cross the line as, ``kv_dtype`` what this side keeps keys and values as. ``oblivious``: whether the
    memory that is touched tells of no token; ``oblivious_embedding``: by which way of the embedding.
    """

    run: RunConfig
    protection: Protection
    partition: Partition | None
    dtype: DtypeName
    linear_dtype: ComputeDtype
    wire_dtype: WireDtype
    kv_dtype: KVDtype
    oblivious: bool
    oblivious_embedding: ObliviousWay

    @property
    def crossing(self) -> str | None:
        """What inputs of products cross the line as: floats, or integers in the private modes; None at ``local``."""
        if self.partition is None:
            return None
        if self.protection.checked:
            return "uint32" if self.protection.masked else "int16"
        return self.wire_dtype

    @classmethod
    def of(cls, run: RunConfig, stored: DtypeName = "bfloat16") -> Plan:
        """``dtype`` may be ``auto``: ``stored``, except in the private modes, which compute in float32 on this side.
        ``kv_dtype``: in the private modes float32 for weights stored so, else bfloat16, unless told otherwise;
        elsewhere it is the compute dtype.

        Raises OptionError and AddressError for what ``rules`` refuse.
        """
        check(run)
        protection = PROTECTIONS[run.protection]
        asked = stored if run.compute.dtype == "auto" else run.compute.dtype
        compute: ComputeDtype = "field" if protection.checked else asked  # what is checked is products mod p
        here = float_dtype(compute)
        return cls(
            run=run,
            protection=protection,
            partition=PARTITIONS[run.compute.partition] if protection.uses_worker else None,
            dtype=here,
            linear_dtype=compute,
            wire_dtype=run.compute.wire_dtype or here,
            kv_dtype=run.compute.kv_dtype or (_kept(stored) if protection.checked else here),
            oblivious=_oblivious(run, protection),
            oblivious_embedding=_way(run),
        )


def _oblivious(run: RunConfig, protection: Protection) -> bool:
    """As was asked for; else in a TEE, whose host may watch, unless the worker is shown more than that."""
    if run.compute.oblivious is not None:
        return run.compute.oblivious
    return (protection.checked or not protection.uses_worker) and detect_tee() is not None


def _way(run: RunConfig) -> ObliviousWay:
    """As was asked for; ``auto`` is no tree for a host that can compare ciphertexts, and so see what was not moved."""
    asked = run.compute.oblivious_embedding
    return "scan" if asked == "auto" and detect_tee() == SEV_SNP else asked


def _kept(stored: DtypeName) -> DtypeName:
    """What private modes keep keys and values of such weights as.

    By the same rule as the compute dtype: a small model in float32 has near ties that bfloat16 decides otherwise.
    """
    return "float32" if stored == "float32" else "bfloat16"
