"""What is told while a model is opened."""

from __future__ import annotations

import pytest

from tests.families import tiny_model
from tsqp import LLM, ComputeConfig
from tsqp.config.dtype import AskedDtype

MODEL = str(tiny_model("llama").directory)
GROUPS = 4 * 2 + 1  # four in each of two layers, and the LM head


class Told:
    """Each thing that was told, with the steps that were done of it, and how many there are."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.totals: dict[str, set[int]] = {}

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        self.steps.setdefault(what, []).append(done)
        self.totals.setdefault(what, set()).add(total)


@pytest.mark.parametrize(
    ("dtype", "reading"),
    [("float32", "reading the weights"), ("int8", "reading and quantising the weights")],
)
def test_at_local_weights_and_loops_are_told(dtype: AskedDtype, reading: str) -> None:
    told = Told()
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype=dtype), progress=told):
        assert list(told.steps) == ["loading libraries", reading, "compiling loops"]
        assert told.steps[reading] == list(range(GROUPS))
        assert told.totals == {"loading libraries": {0}, reading: {GROUPS}, "compiling loops": {0}}
