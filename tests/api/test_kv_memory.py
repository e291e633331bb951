"""How much memory keys and values may take where a run does not say so."""

from __future__ import annotations

import pytest

from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api import kv_memory
from tsqp.api.kv_memory import LEAST_BYTES, fitting_kv_memory
from tsqp.errors import InputError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("available", "expected"), [(8 * GIB, 4 * GIB), (2 * GIB, GIB), (1, LEAST_BYTES), (None, LEAST_BYTES)]
)
def test_half_of_what_is_there(available: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "available_bytes", lambda: available)
    assert fitting_kv_memory() == expected


def test_a_request_that_cannot_fit_is_refused_by_the_name_of_the_option() -> None:
    compute = ComputeConfig(dtype="float32", kv_memory=1000)
    with (
        LLM(str(tiny_model("llama").directory), protection="local", compute=compute) as llm,
        pytest.raises(InputError, match=r"compute\.kv_memory is 1000") as error,
    ):
        llm.generate(random_tokens(5), SamplingParams(max_tokens=2))
    assert error.value.fields == ("compute.kv_memory",)
