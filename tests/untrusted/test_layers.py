"""What a worker keeps for a connection at the ``layer`` partition is bounded, private to it, and goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import pytest
import torch

from tests.commands import LIMIT_S
from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, arrival
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import InputError, ProtocolError, WorkerFailed
from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache
from tsqp.model.weights import ModelWeights
from tsqp.untrusted import layers
from tsqp.untrusted import worker as worker_module
from tsqp.untrusted.compiled_calls import CompiledCalls
from tsqp.untrusted.layers import LayerState
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.codec import decode_reply
from tsqp.wire.messages import Begin, Done, Failed, Finish, Layer, Message, Place

STORE = WeightStore(CHECKPOINT, "float32", torch.device("cpu"))
WEIGHTS = cast(ModelWeights, STORE.prepare("float"))


def tokens(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def whole_pass(state: LayerState, begin: Begin) -> torch.Tensor:
    """A pass in one chunk: its logits."""
    with torch.inference_mode():
        state.begin(begin, tokens(sum(place.rows for place in begin.places)))
        for layer in range(CONFIG.num_layers):
            state.layer(Layer(0, begin.id, layer, 0))
        return state.finish(Finish(0, begin.id, False))


def at_layer(directory: str, worker: str) -> LLM:
    compute = ComputeConfig(partition="layer", dtype="float32")
    return LLM(directory, protection="open", worker=WorkerConfig(worker, patience_s=0), compute=compute)


def test_a_sequence_goes_on_where_it_was() -> None:
    state = LayerState(WEIGHTS)
    assert whole_pass(state, Begin(1, (Place(5, 0, 3), Place(6, 0, 1)), 64)).shape == (2, CONFIG.vocab_size)
    assert whole_pass(state, Begin(2, (Place(5, 3, 1),), 64)).shape == (1, CONFIG.vocab_size)


# What a client may leave out, or do in another order, before its next pass.
LEFT_OUT: dict[str, Sequence[Message]] = {
    "no layer": [Begin(1, (Place(1, 0, 64),), 64), Finish(2, 1, False)],
    "all but one layer": [
        Begin(1, (Place(1, 0, 64),), 64),
        *(Layer(2, 1, layer, 0) for layer in range(1, CONFIG.num_layers)),
        Finish(2, 1, False),
    ],
    "a chunk before the one before it": [
        Begin(1, (Place(1, 0, 64),), 32),
        *(Layer(2, 1, layer, chunk) for chunk in (1, 0) for layer in range(CONFIG.num_layers)),
        Finish(2, 1, False),
    ],
}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out has NaN in it until somebody writes there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_others_left_in_memory_is_not_attended_to(poisoned_memory: None, name: str) -> None:
    """A worker's free memory has what its other clients computed."""
    state, logits = LayerState(WEIGHTS), []
    with torch.inference_mode():
        for message in LEFT_OUT[name]:
            if isinstance(message, Begin):
                state.begin(message, tokens(64))
            elif isinstance(message, Layer):
                state.layer(message)
            elif isinstance(message, Finish):
                logits.append(state.finish(message))
    logits.append(whole_pass(state, Begin(9, (Place(1, 64, 1),), 64)))
    assert all(one.isfinite().all() for one in logits)


BAD: dict[str, Sequence[Message]] = {
    "a position that is not the next": [Begin(1, (Place(1, 7, 1),), 8)],
    "a sequence twice": [Begin(1, (Place(1, 0, 1), Place(1, 0, 1)), 8)],
    "longer than the context": [Begin(1, (Place(1, 0, CONFIG.max_positions + 1),), 8)],
    "no such pass": [Layer(2, 9, 0, 0)],
    "no such layer": [Begin(1, (Place(1, 0, 2),), 8), Layer(2, 1, CONFIG.num_layers, 0)],
    "no such chunk": [Begin(1, (Place(1, 0, 2),), 8), Layer(2, 1, 0, 1)],
    "no pass to finish": [Finish(1, 3, False)],
    "finished twice": [Begin(1, (Place(1, 0, 2),), 8), Finish(2, 1, False), Finish(3, 1, False)],
    "a sequence of a pass that is under way": [Begin(1, (Place(1, 0, 2),), 8), Begin(2, (Place(1, 0, 1),), 8)],
    "to forget one": [Begin(1, (Place(1, 0, 2),), 8), Begin(2, (Place(2, 0, 2),), 8, forget=(1,))],
    "too many passes": [Begin(n, (Place(n, 0, 1),), 8) for n in range(1, layers.MAX_PASSES + 2)],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_fail_and_the_connection_goes_on(name: str) -> None:
    worker = Worker(STORE)
    worker.answer(arrival(HELLO))
    replies = []
    for message in BAD[name]:
        rows = sum(place.rows for place in message.places) if isinstance(message, Begin) else 0
        frames = worker.answer(arrival(message, *([tokens(rows)] if rows else [])))
        assert frames is not None
        replies.append(decode_reply(frames.control))
    assert all(isinstance(reply, Done) for reply in replies[:-1])
    assert isinstance(replies[-1], Failed)


def test_what_is_forgotten_too_early_is_still_there() -> None:
    """On a device its pages would be somebody else's while a pass goes on in them."""
    state = LayerState(WEIGHTS)
    with torch.inference_mode():
        state.begin(Begin(1, (Place(1, 0, 2),), 8), tokens(2))
        with pytest.raises(ProtocolError, match="sequence 1 is in a pass"):
            state.begin(Begin(2, (Place(2, 0, 2),), 8, forget=(1,)), tokens(2))
        for layer in range(CONFIG.num_layers):
            state.layer(Layer(0, 1, layer, 0))
        state.finish(Finish(0, 1, False))
    whole_pass(state, Begin(3, (Place(1, 2, 1),), 8))
    whole_pass(state, Begin(4, (Place(2, 0, 2),), 8, forget=(1,)))
    assert list(state._caches) == [2]


ONE_CACHE = KVCache(CONFIG, torch.float32).bytes_for(1)  # as small as one can be


def held(state: LayerState) -> int:
    """Bytes of all caches."""
    caches = cast("list[KVCache]", list(state._caches.values()))
    return sum(part.nbytes for cache in caches for layer in cache._layers for part in (layer.keys, layer.values))


def test_the_caches_of_a_connection_are_bounded() -> None:
    """By the memory that they have, which is more than that of their positions."""
    state = LayerState(WEIGHTS, max_cache_bytes=3 * ONE_CACHE)
    whole_pass(state, Begin(1, (Place(1, 0, 8), Place(2, 0, 1)), 16))
    whole_pass(state, Begin(2, (Place(3, 0, 1),), 8))
    with pytest.raises(ProtocolError, match="KV caches"):
        whole_pass(state, Begin(3, (Place(4, 0, 1),), 8))
    whole_pass(state, Begin(4, (Place(4, 0, 1),), 8, forget=(1,)))  # what is forgotten makes room
    assert held(state) == 3 * ONE_CACHE


def test_passes_under_way_count_with_what_they_will_store() -> None:
    state = LayerState(WEIGHTS, max_cache_bytes=2 * ONE_CACHE)
    with torch.inference_mode():
        state.begin(Begin(1, (Place(1, 0, 2),), 8), tokens(2))
        state.begin(Begin(2, (Place(2, 0, 2),), 8), tokens(2))
        with pytest.raises(ProtocolError, match="KV caches"):
            state.begin(Begin(3, (Place(3, 0, 2),), 8), tokens(2))


def test_a_pass_that_does_not_begin_leaves_no_sequences() -> None:
    state = LayerState(WEIGHTS)
    with torch.inference_mode(), pytest.raises(ProtocolError, match="sequence 3 has 0 positions"):
        state.begin(Begin(1, (Place(1, 0, 1), Place(2, 0, 1), Place(3, 7, 1)), 8), tokens(3))
    assert not state._caches
    whole_pass(state, Begin(2, (Place(1, 0, 1),), 8))
    assert list(state._caches) == [1]


def test_one_connection_cannot_name_what_another_keeps() -> None:
    worker = Worker(STORE)
    for peer in (b"one", b"two"):
        worker.answer(arrival(HELLO, peer=peer))
    worker.answer(arrival(Begin(1, (Place(1, 0, 2),), 8), tokens(2), peer=b"one"))
    frames = worker.answer(arrival(Layer(2, 1, 0, 0), peer=b"two"))
    assert frames is not None
    assert isinstance(decode_reply(frames.control), Failed)


def test_connections_with_state_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_STATEFUL_CONNECTIONS", 2)
    worker = Worker(STORE)
    for number in range(5):
        worker.answer(arrival(HELLO, peer=b"%d" % number))
        worker.answer(arrival(Begin(1, (Place(1, 0, 2),), 8), tokens(2), peer=b"%d" % number))
    assert len(worker._connections) == 2


@pytest.mark.parametrize("transport", ["mem", "shm"])
def test_state_goes_with_the_connection(
    transport: str, monkeypatch: pytest.MonkeyPatch, start_worker: StartWorker
) -> None:
    import threading

    gone = threading.Event()
    pop = dict.pop

    class Watched(dict[bytes, object]):
        def pop(self, key: bytes, *default: object) -> object:
            found = pop(self, key, *default)
            if not self:
                gone.set()
            return found

    init = Worker.__init__

    def watched_init(self: Worker, store: WeightStore, calls: CompiledCalls | None = None) -> None:
        init(self, store, calls)
        self._connections = Watched()  # type: ignore[assignment]

    monkeypatch.setattr(Worker, "__init__", watched_init)
    directory = str(tiny_model("llama").directory)
    with at_layer(directory, start_worker(directory, transport)) as llm:
        llm.generate(random_tokens(5), SamplingParams(max_tokens=2))
        gone.clear()
    assert gone.wait(LIMIT_S)


def test_traffic_is_token_ids_and_one_row_of_logits(start_worker: StartWorker) -> None:
    directory = str(tiny_model("llama").directory)
    with at_layer(directory, start_worker(directory)) as llm:
        llm.generate(random_tokens(100), SamplingParams(max_tokens=1))
        stats = llm.stats.as_dict()
    calls = 2 + 2
    assert stats["bytes_received"] == 320 * 4
    assert stats["bytes_sent"] <= 100 * 4 + calls * 64  # type: ignore[operator]


def test_a_forgotten_sequence_makes_room_on_the_worker(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with room for three answers gives thirty, one after another, if it is told which are over."""
    directory = str(tiny_model("llama").directory)
    config = open_checkpoint(directory).config
    room = 3 * KVCache(config, torch.float32).bytes_for(5 + 2)
    monkeypatch.setattr("tsqp.untrusted.paths.plain.LayerState", partial(LayerState, max_cache_bytes=room))

    def answer_thirty() -> None:
        with at_layer(directory, start_worker(directory)) as llm:
            for seed in range(30):  # each prompt is a sequence of its own, let go when it is answered
                llm.generate(random_tokens(5, seed), SamplingParams(max_tokens=2))

    answer_thirty()
    monkeypatch.setattr("tsqp.trusted.remote.layers.MAX_FORGET", 0)
    with pytest.raises(WorkerFailed, match="KV caches"):
        answer_thirty()


def test_a_worker_that_lost_the_cache_is_reported(monkeypatch: pytest.MonkeyPatch, start_worker: StartWorker) -> None:
    directory = str(tiny_model("llama").directory)
    with at_layer(directory, start_worker(directory)) as llm:
        stream = llm.stream(random_tokens(5), SamplingParams(max_tokens=20))
        next(stream)
        monkeypatch.setattr(
            LayerState, "_cache", lambda *_: (_ for _ in ()).throw(ProtocolError("sequence 1 has 0 positions"))
        )
        with pytest.raises(WorkerFailed, match="0 positions"):
            list(stream)


def test_a_pass_has_no_more_sequences_than_the_protocol_allows(start_worker: StartWorker) -> None:
    directory = str(tiny_model("llama").directory)
    with at_layer(directory, start_worker(directory)) as llm:
        engine = llm.engine
        with pytest.raises(InputError, match="65 prompts"):
            engine.run(Batch([[1]] * 65, [engine.decoder.new_cache() for _ in range(65)]))
        answers = llm.generate([[1]] * 65, SamplingParams(max_tokens=2))  # one waits until another has ended
        assert [answer.token_ids for answer in answers] == [answers[0].token_ids] * 65
