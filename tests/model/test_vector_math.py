"""No pass makes the first call of a function of oneMKL's."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Torch hands every call to this mode, with what it is of.
FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams

first = {}

class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].rstrip("_")
        if name in ("cos", "sin", "tanh"):
            first.setdefault(name, args[0].numel())
        return function(*args, **(kwargs or {}))

path = str(tiny_model("gemma2").directory)  # which has soft caps
with Watching(), LLM(path, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
    llm.generate(random_tokens(20), SamplingParams(max_tokens=2))
print(first)
"""


@pytest.mark.slow
def test_the_first_call_of_each_function_is_of_one_number() -> None:
    """In a process of its own: in this one other tests have called them."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "{'cos': 1, 'sin': 1, 'tanh': 1}"
