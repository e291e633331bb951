"""Norms and activations by torch.compile are those of plain torch, and one graph serves any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.families import tiny_model
from tests.untrusted.fake_driver import FakeDriver
from tests.untrusted.shm_worker import fake_backend
from tsqp.checkpoint import open_checkpoint
from tsqp.model.kernels import Kernels, TorchKernels
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.compiled import Compiler
from tsqp.untrusted.fused_kernels import FusedKernels
from tsqp.untrusted.layers import LayerState
from tsqp.untrusted.store import WeightStore
from tsqp.wire.messages import Begin, Finish, Layer, Place

EPS = 1e-5


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # the first traces as the second does, and takes no compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_torch(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    fused = FusedKernels(partial(torch.compile, backend=backend, dynamic=True, fullgraph=True))
    for rows in (1, 2, 7, 30):
        for here, there in zip(results(TorchKernels(), rows, dtype), results(fused, rows, dtype), strict=True):
            torch.testing.assert_close(there, here, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def results(kernels: Kernels, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rows)
    x, y, weight, gate_up = (
        torch.randn(*shape, generator=random).to(dtype) for shape in ((rows, 24), (rows, 24), (24,), (rows, 80))
    )
    found = [torch.empty_like(x) for _ in range(3)]
    found += [torch.empty(rows, 40, dtype=dtype), torch.empty(rows, 40, dtype=dtype), torch.empty_like(gate_up)]
    kernels.rms_norm(x, weight, EPS, found[0])
    kernels.add_rms_norm(x, y, weight, EPS, found[1])
    kernels.layer_norm(y, weight, EPS, found[2])
    kernels.silu_mul(gate_up, found[3])
    kernels.gelu_mul(gate_up, found[4])
    kernels.relu_squared(gate_up, found[5])
    return [*found, x]


@pytest.mark.parametrize("family", ["llama", "qwen3", "arcee", "gemma2", "cohere"])
def test_a_pass_uses_what_was_compiled_before_it_and_no_more(family: str) -> None:
    used = set[str]()

    def compile_one(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            used.add(function.__name__)
            return function(*args)

        return noted

    kernels = FusedKernels(compile_one)
    weights = ModelWeights.load(open_checkpoint(str(tiny_model(family).directory)), "float32", torch.device("cpu"))
    backend = fake_backend(FakeDriver())
    kernels.warm_up(weights.config, weights.dtype, weights.device)
    compiled, used = used, set()
    with torch.inference_mode(), backend.serving():
        state = LayerState(replace(weights, kernels=kernels), backend)
        state.begin(Begin(1, (Place(1, 0, 2),), 64), torch.tensor([1, 2], dtype=torch.int32))
        for layer in range(weights.config.num_layers):
            state.layer(Layer(2, 1, layer, 0))
        state.finish(Finish(3, 1, False))
    assert used == compiled


@pytest.mark.slow
def test_a_worker_on_a_device_that_compiles_has_them_in_its_layers() -> None:
    checkpoint = open_checkpoint(str(tiny_model("qwen3").directory))
    backend = fake_backend(FakeDriver())
    store = WeightStore(checkpoint, "float32", torch.device("cpu"), compiler=Compiler(), backend=backend)
    weights = store.prepare("float")
    assert isinstance(weights, ModelWeights)
    assert isinstance(weights.kernels, FusedKernels)
    state = LayerState(weights, backend)
    assert state._compute.block.kernels is weights.kernels  # type: ignore[attr-defined]
