"""How much memory keys and values may take where a run does not say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api import kv_memory
from tsqp.api.kv_memory import LEAST_BYTES, fitting_kv_memory
from tsqp.errors import InputError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("available", "limits", "expected"),
    [(8 * GIB, [], 4 * GIB), (8 * GIB, [6 * GIB, 2 * GIB], GIB), (1, [], LEAST_BYTES), (None, [], LEAST_BYTES)],
)
def test_half_of_what_is_there(
    available: int | None, limits: list[int], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "meminfo"
    if available is not None:
        memory.write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
    monkeypatch.setattr(kv_memory, "MEMORY", memory)
    monkeypatch.setattr(kv_memory, "limits_left", lambda _: iter(limits))
    assert fitting_kv_memory() == expected


def test_a_request_that_cannot_fit_is_refused_by_the_name_of_the_option() -> None:
    compute = ComputeConfig(dtype="float32", kv_memory=1000)
    with (
        LLM(str(tiny_model("llama").directory), protection="local", compute=compute) as llm,
        pytest.raises(InputError, match=r"compute\.kv_memory is 1000") as error,
    ):
        llm.generate(random_tokens(5), SamplingParams(max_tokens=2))
    assert error.value.fields == ("compute.kv_memory",)
