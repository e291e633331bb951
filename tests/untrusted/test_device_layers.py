"""Passes on a device, over the late driver, are those of the host: same logits, whatever the batches and caches."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.families import FAMILIES, MORE_FAMILIES, random_tokens, tiny_model
from tests.untrusted.fake_driver import FakeDriver
from tests.untrusted.shm_worker import fake_backend
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import ProtocolError
from tsqp.model.weights import ModelWeights
from tsqp.untrusted import step_graphs
from tsqp.untrusted.layers import LayerState
from tsqp.untrusted.pages import FIRST_PAGES, PAGE, Pages
from tsqp.untrusted.step_graphs import StepRows
from tsqp.wire.messages import Begin, Finish, Layer, Place

# Windows, beside layers without one; tables that follow the length; norms after; capped scores; a parallel block.
USUAL = ("llama-biases", "qwen2-window", "dynamic-rope", "phi3-longrope", "olmo2", "gemma2", "cohere2")
FAMILY = [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in [*FAMILIES, *MORE_FAMILIES]]


@cache
def weights_of(family: str) -> ModelWeights:
    return ModelWeights.load(open_checkpoint(str(tiny_model(family).directory)), "float32", torch.device("cpu"))


class Client:
    """Passes of one connection, by numbers that it gives."""

    def __init__(self, state: LayerState, layers: int) -> None:
        self.state, self._layers, self._begun = state, range(layers), 0

    def begin(self, *places: tuple[int, int, int], max_rows: int = 64, forget: Sequence[int] = ()) -> Begin:
        self._begun += 1
        call = Begin(self._begun, tuple(Place(*place) for place in places), max_rows, tuple(forget))
        rows = sum(place.rows for place in call.places)
        self.state.begin(call, torch.tensor(random_tokens(rows, self._begun), dtype=torch.int32))
        return call

    def layers(self, call: Begin) -> None:
        rows = sum(place.rows for place in call.places)
        for chunk in range(-(-rows // call.max_rows)):
            for layer in self._layers:
                self.state.layer(Layer(0, call.id, layer, chunk))

    def whole(
        self, *places: tuple[int, int, int], max_rows: int = 64, forget: Sequence[int] = (), every_row: bool = False
    ) -> torch.Tensor:
        call = self.begin(*places, max_rows=max_rows, forget=forget)
        self.layers(call)
        return self.state.finish(Finish(0, call.id, every_row)).clone()


class Both:
    """The same passes on the host and on a device."""

    def __init__(self, family: str, driver: FakeDriver) -> None:
        weights = weights_of(family)
        self.backend = fake_backend(driver)
        self.clients = [
            Client(state, weights.config.num_layers)
            for state in (LayerState(weights), LayerState(weights, self.backend))
        ]

    def whole(self, *places: tuple[int, int, int], **options: object) -> None:
        here, there = (client.whole(*places, **options) for client in self.clients)  # type: ignore[arg-type]
        self.close(here, there)

    def close(self, here: torch.Tensor | list[torch.Tensor], there: torch.Tensor | list[torch.Tensor]) -> None:
        self.backend.settle()  # comparing waits for the device
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@contextmanager
def both(family: str = "llama", driver: FakeDriver | None = None) -> Iterator[tuple[Both, FakeDriver]]:
    driver = driver or FakeDriver()
    one = Both(family, driver)
    with torch.inference_mode(), one.backend.serving():
        yield one, driver


@pytest.mark.parametrize("family", FAMILY)
def test_logits_are_those_of_the_host(family: str) -> None:
    """Prompts over several pages, in chunks; steps of several sequences; a step of three rows; one that is over."""
    most = weights_of(family).config.max_positions - 20
    long = min(150, most)
    with both(family) as (passes, driver):
        passes.whole((1, 0, long))
        passes.whole((2, 0, 5), (3, 0, 17), max_rows=8)
        for step in range(3):
            passes.whole((1, long + step, 1), (2, 5 + step, 1), (3, 17 + step, 1))
        passes.whole((1, long + 3, 3), every_row=True)
        passes.whole((4, 0, 1), forget=[2])
        passes.whole((1, long + 6, 1))
        assert driver.replayed == 5 * (weights_of(family).config.num_layers + 2)


class Launches(TorchDispatchMode):
    """Counts operators that are no views of memory that is there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        writes = func._schema.is_mutable
        own = [one.untyped_storage().data_ptr() for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        self.count += writes or (not held.issuperset(own) and "empty" not in func.__name__)
        return found


def test_a_layer_is_few_launches() -> None:
    """Two norms, one rotation of queries and keys together, three stores, four products, SiLU, attention, two sums."""
    with both("llama") as (passes, _):
        there = passes.clients[1]
        call = there.begin((1, 0, 5))
        with Launches() as launches:
            there.state.layer(Layer(0, call.id, 0, 0))
        assert launches.count <= 22


def test_a_step_that_comes_again_is_not_captured_again() -> None:
    with both() as (passes, driver):
        passes.whole((1, 0, 3), (2, 0, 2), (3, 0, 2))
        passes.whole((1, 3, 1), (2, 2, 1), (3, 2, 1))
        captured = driver.captured
        assert captured == 2 + weights_of("llama").config.num_layers
        for step in range(1, 4):
            passes.whole((1, 3 + step, 1), (2, 2 + step, 1), (3, 2 + step, 1))
        passes.whole((4, 0, 1), (1, 7, 1), (2, 6, 1), (3, 6, 1))  # four rows are rounded up to no more
        assert driver.captured == captured


def test_a_longer_sequence_has_graphs_of_its_own() -> None:
    with both() as (passes, driver):
        passes.whole((1, 0, PAGE - 1))
        passes.whole((1, PAGE - 1, 1))
        few = driver.captured
        passes.whole((1, PAGE, 1))
        assert driver.captured == 2 * few


def test_two_passes_under_way_do_not_meet() -> None:
    """The second has the same number of rows and pages as the first, so it cannot have the same memory."""
    found = []
    with both() as (passes, _):
        passes.whole((1, 0, 4), (2, 0, 6))
        for client in passes.clients:
            first = client.begin((1, 4, 1))
            second = client.begin((2, 6, 1))
            client.layers(second)
            client.layers(first)
            found.append([client.state.finish(Finish(0, call.id, False)).clone() for call in (first, second)])
        passes.close(*found)
        passes.whole((1, 5, 1))


def test_caches_that_move_take_a_pass_along() -> None:
    """A pass that has begun as graphs ends as one, though another has made the caches grow meanwhile."""
    found = []
    long = FIRST_PAGES * PAGE // 8
    with both() as (passes, driver):
        passes.whole((1, 0, 4))
        for client in passes.clients:
            first = client.begin((1, 4, 1))
            client.state.layer(Layer(0, first.id, 0, 0))
            others = [client.begin((number, 0, long)) for number in (2, 3)]
            for number in (4, 5, 6, 7, 8, 9):
                client.layers(others[-1])
                client.state.finish(Finish(0, others.pop().id, False))
                others.append(client.begin((number, 0, long)))
            client.state.layer(Layer(0, first.id, 1, 0))
            found.append(client.state.finish(Finish(0, first.id, False)).clone())
            for other in others:
                client.state.finish(Finish(0, other.id, False))
        passes.close(*found)
        captured = driver.captured
        passes.whole((1, 5, 1))
        assert driver.captured > captured, "graphs of caches that have moved would write where these were"


def test_graphs_are_made_again_after_the_last_of_them_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    """Because the caches have moved, or with their connection. What they shared has gone with them."""
    weights, driver = weights_of("llama"), FakeDriver()
    backend = fake_backend(driver)
    with torch.inference_mode(), backend.serving():
        for _ in range(2):
            client = Client(LayerState(weights, backend), weights.config.num_layers)
            for step in range(2):
                captured = driver.captured
                client.whole((1 + step, 0, 3))
                client.whole((1 + step, 3, 1))
                assert driver.captured > captured
                client.whole(*((100 * (1 + step) + n, 0, 2) for n in range(FIRST_PAGES)))  # which is no step
    assert "CUDA graphs are not used" not in caplog.text


def test_without_graphs_the_same_is_launched_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="tsqp.worker")
    with both(driver=FakeDriver(graphs=False)) as (passes, driver):
        passes.whole((1, 0, 3), (2, 0, 2))
        passes.whole((1, 3, 1), (2, 2, 1))
        passes.whole((1, 4, 1))
        assert driver.replayed == 0
    assert sum("CUDA graphs are not used" in record.message for record in caplog.records) == 1


def test_a_call_between_waits_for_nothing() -> None:
    with both() as (passes, driver):
        passes.whole((1, 0, 30))
        client = passes.clients[1]
        for call in (client.begin((1, 30, 1)), client.begin((2, 0, 5))):
            passes.backend.settle()
            waited = driver.synchronised
            client.layers(call)
            passes.backend.settle()
            assert driver.synchronised == waited


def test_steps_that_would_copy_too_much_at_once_are_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = weights_of("llama").config
    monkeypatch.setattr(step_graphs, "GATHERED_BYTES", 2 * 2 * PAGE * config.kv_size * 4)
    with both() as (passes, driver):
        passes.whole((1, 0, 3), (2, 0, PAGE + 1))
        passes.whole((1, 3, 1), (2, PAGE + 1, 1))  # two rows over two pages each
        assert driver.replayed == 0
        passes.whole((2, PAGE + 2, 1))
        assert driver.replayed > 0


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MOST_STEPS", 2)
    with both() as (passes, _):
        for rows in (1, 2, 4, 8):
            passes.whole(*((10 * rows + row, 0, 1) for row in range(rows)))
        compute = passes.clients[1].state._compute
        assert len(compute.graphs._steps) == 2  # type: ignore[attr-defined]


def test_the_caches_are_bounded_and_what_is_forgotten_makes_room() -> None:
    weights = weights_of("llama")
    config = weights.config
    one_page = 2 * config.num_layers * config.kv_size * PAGE * 4
    backend = fake_backend(FakeDriver())
    state = LayerState(weights, backend, max_cache_bytes=2 * one_page)
    client = Client(state, config.num_layers)
    with torch.inference_mode(), backend.serving():
        client.whole((1, 0, PAGE + 1))
        with pytest.raises(ProtocolError, match="KV caches"):
            client.begin((2, 0, 1))
        client.whole((2, 0, 2 * PAGE), forget=[1])
        assert state._compute.pages.memory.shape[2] == 1 + 2  # type: ignore[attr-defined]


def test_what_a_sequence_leaves_does_not_spoil_the_next() -> None:
    """Its numbers may be none: a masked NaN times nothing is still NaN."""
    with both() as (passes, _):
        passes.whole((1, 0, 10))
        passes.clients[1].state._compute.pages.memory.fill_(torch.nan)  # type: ignore[attr-defined]
        passes.whole((2, 0, 3), forget=[1])
        passes.clients[1].state._compute.pages.memory[:, :, 0] = 0  # type: ignore[attr-defined]
        passes.whole((2, 3, 1))


def test_lack_of_memory_for_caches_leaves_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Pages, pages: int) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with both() as (passes, _):
        passes.whole((1, 0, 10))
        large = [(number, 0, 2 * PAGE) for number in range(2, 20)]
        state = passes.clients[1].state
        free = list(state._compute.pages._free)  # type: ignore[attr-defined]
        with monkeypatch.context() as patched:
            patched.setattr(Pages, "_new", full)
            with pytest.raises(torch.OutOfMemoryError):
                passes.clients[1].begin(*large)
        assert list(state._caches) == [1]
        assert state._compute.pages._free == free  # type: ignore[attr-defined]
        passes.clients[1]._begun -= 1  # it comes again, with the same tokens
        passes.whole((1, 10, 1))
        passes.whole(*large)


@pytest.mark.parametrize("graphs", [True, False])
def test_everything_goes_with_the_connection(graphs: bool) -> None:
    """Device memory does not wait for Python's collector."""
    gc.disable()
    try:
        with both(driver=FakeDriver(graphs=graphs)) as (passes, _):
            passes.whole((1, 0, 3))
            passes.whole((1, 3, 1))
            memory = weakref.ref(passes.clients[1].state._compute.pages.memory)  # type: ignore[attr-defined]
            steps = weakref.ref(next(iter(passes.clients[1].state._compute.graphs._steps.values())))  # type: ignore[attr-defined]
            assert isinstance(steps(), StepRows)
            passes.clients.clear()
            assert memory() is None
            assert steps() is None
    finally:
        gc.enable()
