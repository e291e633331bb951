"""What benchmarks compare is computed in the same numbers."""

from __future__ import annotations

import pytest

from tsqp.api.config import RunConfig
from tsqp.api.plan import Plan
from tsqp.bench.modes import chosen_modes, in_mode
from tsqp.bench.opened import in_bfloat16
from tsqp.config.protection import PROTECTIONS, ProtectionName

TINY = "synthetic:tiny"


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_keys_and_values_are_in_16_bits_however_weights_are_stored(protection: ProtectionName) -> None:
    """The default model is stored in float32, and its private modes would keep that."""
    plan = Plan.of(in_bfloat16(RunConfig(TINY, protection)), "float32")
    assert plan.kv_dtype == "bfloat16"


@pytest.mark.parametrize("mode", chosen_modes(None))
def test_so_are_those_of_a_servers_modes(mode: str) -> None:
    assert Plan.of(in_mode(RunConfig(TINY, "open"), mode), "float32").kv_dtype == "bfloat16"
