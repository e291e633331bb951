"""What is told while a model is opened."""

from __future__ import annotations

import re

import pytest

from tests.families import tiny_model
from tsqp import LLM, ComputeConfig
from tsqp.config.dtype import AskedDtype
from tsqp.progress import Timings

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
        pieces = ["reading the tokenizer", reading, "reading the embedding"]
        assert list(told.steps) == ["loading libraries", *pieces, "compiling loops"]
        assert told.steps[reading] == list(range(GROUPS))
        assert told.totals == {what: {GROUPS if what == reading else 0} for what in told.steps}


def test_timings_keep_how_long_each_thing_took() -> None:
    told, now = Told(), [10.0]
    timings = Timings(told, lambda: now[0])
    for passed, what, done in ((5.0, "a", 0), (1.0, "a", 1), (2.0, "b", 0), (4.0, "a", 0)):
        now[0] += passed
        timings(what, done, 2)
    now[0] += 8
    timings.end()
    timings.end()
    assert timings.seconds == {"a": 1.0 + 2.0 + 8.0, "b": 4.0}
    assert told.steps == {"a": [0, 1, 0], "b": [0]}


def test_what_was_read_is_a_line() -> None:
    with LLM("synthetic:tiny", protection="local") as llm:
        assert re.fullmatch(r"read no file in \d+\.\d s", llm.read_line)
