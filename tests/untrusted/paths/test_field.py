"""The field path of a worker: exact whatever the kernel, prepared when asked for, and no call of another path."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.arith.kernels import CPU, KERNELS
from tests.conftest import StartWorker
from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, PEER, answer, arrival, greet
from tests.untrusted.fake_driver import FakeDriver
from tsqp.arith.expand import BLOCK_ROWS, AesKeyStream, expand
from tsqp.arith.field import MAX_SMALL
from tsqp.arith.modulus import P
from tsqp.arith.product import DigitKernel
from tsqp.arith.quantise import quantise_rows
from tsqp.config.groups import LAYER_GROUPS, GroupKey, GroupName, linear_groups, part_tensor
from tsqp.errors import UnsupportedModel
from tsqp.model import quantised
from tsqp.model.quantised import GroupDigests, load_quantised_group
from tsqp.model.weights import ModelWeights
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.untrusted.paths import field, plain
from tsqp.untrusted.paths.field import FieldWorkerWeights
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.codec import decode_reply
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    AttentionScores,
    AttentionValues,
    Begin,
    Done,
    Embed,
    Failed,
    Finish,
    Hello,
    Layer,
    Linear,
    Message,
    MultiplyPads,
    Place,
    Product,
    Refused,
    Welcome,
)
from tsqp.wire.payload import tensor_bytes
from tsqp.wire.transport import connect

KEYS: list[GroupKey] = [("qkv", 0), ("down", 1), ("lm_head", None)]
FIELD = Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field")
HIDDEN = CONFIG.hidden_size


def store(kernel: DigitKernel | None = None) -> WeightStore:
    return WeightStore(CHECKPOINT, "float32", CPU, kernel=kernel)


@pytest.fixture(params=["cpu", "cuda"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    backend = CpuBackend() if request.param == "cpu" else CudaBackend(FakeDriver())
    worker = Worker(WeightStore(CHECKPOINT, "float32", CPU, backend=backend))
    with torch.inference_mode(), backend.serving():
        assert isinstance(greet(worker, FIELD), Welcome)
        yield worker


def weights(key: GroupKey) -> torch.Tensor:
    return load_quantised_group(CHECKPOINT, key).wq


def reference(x: torch.Tensor, key: GroupKey) -> torch.Tensor:
    """x·Wqᵀ over the integers: sums of 31-bit times 8-bit numbers fit into int64."""
    return x.long() @ weights(key).long().t()


def canonical(rows: int, columns: int) -> torch.Tensor:
    """Numbers mod p, among them the extremes, as the bits of uint32."""
    x = torch.randint(0, P, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.int32)
    x[0, :4] = torch.tensor([0, P - 1, P // 2, P // 2 + 1])
    return x


def product_of(worker: Worker, message: Message, payload: torch.Tensor) -> torch.Tensor:
    """The product of a call that must succeed, int32."""
    frames = worker.answer(arrival(message, payload))
    assert frames is not None
    assert isinstance(decode_reply(frames.control), Done)
    return torch.frombuffer(bytearray(frames.tensors[0]), dtype=torch.int32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_products_are_those_of_int64(kernel: DigitKernel, key: GroupKey, rows: int) -> None:
    worker = Worker(store(kernel))
    greet(worker, FIELD)
    group = linear_groups(CONFIG)[key[0]]
    x = canonical(rows, group.in_features)
    got = product_of(worker, Product(1, *key, rows, 4), x)
    assert torch.equal(got.long(), (reference(x, key) % P).flatten())
    small = torch.randint(-MAX_SMALL, MAX_SMALL + 1, x.shape, generator=torch.Generator().manual_seed(1))
    got = product_of(worker, Product(2, *key, rows, 2), small.to(torch.int16))
    assert torch.equal(got.long(), (reference(small, key) % P).flatten())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blocks", [1, 3, field.DEALT_BLOCKS + 1])
def test_dealt_products_are_those_of_the_expanded_keys(kernel: DigitKernel, blocks: int) -> None:
    worker = Worker(store(kernel))
    greet(worker, FIELD)
    keys = torch.randint(0, 256, (blocks, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(blocks))
    pads = np.empty((blocks, BLOCK_ROWS, HIDDEN), np.uint32)
    for key, rows in zip(keys, pads, strict=True):
        expand(AesKeyStream(bytes(key.tolist())), rows)
    expected = reference(torch.from_numpy(pads.view(np.int32)).flatten(0, 1), ("qkv", 1)) % P
    got = product_of(worker, MultiplyPads(1, "qkv", 1, blocks), keys)
    assert torch.equal(got.long(), expected.flatten())


@pytest.mark.parametrize("message", [Product(1, "qkv", 0, 2, 4), MultiplyPads(1, "qkv", 0, 1)])
def test_a_product_is_computed_in_its_place(worker: Worker, message: Message) -> None:
    payload = canonical(2, HIDDEN) if isinstance(message, Product) else torch.zeros(32, dtype=torch.uint8)
    expected = product_of(worker, message, payload)
    place = memoryview(bytearray(expected.nbytes))
    frames = worker.answer(arrival(message, payload)._replace(reply=place))
    assert frames is not None
    assert frames.tensors[0] is place
    assert bytes(place) == bytes(tensor_bytes(expected))


@pytest.mark.parametrize("transport", ["mem", "ipc", "shm", "tcp"])
def test_over_every_transport(transport: str, start_worker: StartWorker) -> None:
    address = start_worker("synthetic:tiny", transport, dtype="field")
    session = WorkerSession(
        connect(address),
        CONFIG,
        HELLO.fingerprint,
        wire_dtype="float32",
        dtype="float32",
        stats=Stats(),
        deadline_s=10.0,
        path="field",
    )
    x = canonical(5, HIDDEN)
    slot = session.slot(x.nbytes, 5 * linear_groups(CONFIG)["gate_up"].out_features * 4)
    for layer in (1, 0):
        slot.tensor[:] = tensor_bytes(x)
        reply = session.ask("linear", Product(session.next_id(), "gate_up", layer, 5, 4), slot).wait()
        got = torch.frombuffer(bytearray(reply), dtype=torch.int32)
        assert torch.equal(got.long(), (reference(x, ("gate_up", layer)) % P).flatten())
    del slot, reply
    session.close()


X4, X2 = torch.zeros(2, HIDDEN, dtype=torch.int32), torch.zeros(2, HIDDEN, dtype=torch.int16)
ONE_KEY = torch.zeros(32, dtype=torch.uint8)
GOOD = Product(7, "qkv", 0, 2, 4)
TOKENS = torch.zeros(1, dtype=torch.int32)
BAD_CALLS: dict[str, tuple[Message, list[torch.Tensor], str]] = {
    "a layer that is not there": (Product(1, "qkv", CONFIG.num_layers, 2, 4), [X4], "no group"),
    "no layer": (Product(1, "qkv", None, 2, 4), [X4], "no group"),
    "a layer for the head": (Product(1, "lm_head", 0, 2, 4), [X4], "no group"),
    "more rows than sent": (Product(1, "qkv", 0, 3, 4), [X4], "bytes"),
    "fewer rows than sent": (Product(1, "qkv", 0, 1, 4), [X4], "bytes"),
    "two digits for four": (Product(1, "qkv", 0, 2, 4), [X2], "bytes"),
    "four digits for two": (Product(1, "qkv", 0, 2, 2), [X4], "bytes"),
    "the rows of another group": (Product(1, "down", 0, 2, 4), [X4], "bytes"),
    "no payload": (Product(1, "qkv", 0, 2, 4), [], "payloads"),
    "two payloads": (Product(1, "qkv", 0, 2, 4), [X4, X4], "payloads"),
    "an enormous product": (Product(1, "qkv", 0, 2**31 - 1, 4), [X4], "bytes"),
    "pads in a layer that is not there": (MultiplyPads(1, "qkv", CONFIG.num_layers, 1), [ONE_KEY], "no group"),
    "pads without keys": (MultiplyPads(1, "qkv", 0, 1), [], "payloads"),
    "half a key": (MultiplyPads(1, "qkv", 0, 1), [ONE_KEY[:16]], "bytes"),
    "a key too few": (MultiplyPads(1, "qkv", 0, 2), [ONE_KEY], "bytes"),
    "a key too many": (MultiplyPads(1, "qkv", 0, 1), [ONE_KEY.repeat(2)], "bytes"),
    "linear": (Linear(1, "qkv", 0, None, 2), [torch.zeros(2, HIDDEN)], "no linear"),
    "embed": (Embed(1, 1), [TOKENS], "no embed"),
    "scores": (AttentionScores(1, 1, 1), [X4, X4], "no attention_scores"),
    "mix": (AttentionValues(1, 1, 1), [X4, X4], "no attention_values"),
    "begin": (Begin(1, (Place(1, 0, 1),), 8), [TOKENS], "no begin"),
    "layer": (Layer(1, 0, 0, 0), [], "no layer"),
    "finish": (Finish(1, 0, False), [], "no finish"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_fails_and_the_next_one_works(worker: Worker, name: str) -> None:
    message, payloads, words = BAD_CALLS[name]
    reply = answer(worker, message, *payloads)
    assert isinstance(reply, Failed)
    assert words in reply.reason
    assert isinstance(answer(worker, GOOD, X4), Done)


@pytest.mark.parametrize("size", [0, 4, 2 * 128 * 4 - 4, 2 * 128 * 4 + 4])
@pytest.mark.parametrize("message", [GOOD, MultiplyPads(7, "qkv", 0, 1)])
def test_room_of_another_size_is_refused(worker: Worker, message: Message, size: int) -> None:
    payload = X4 if isinstance(message, Product) else ONE_KEY
    frames = worker.answer(arrival(message, payload)._replace(reply=memoryview(bytearray(size))))
    assert frames is not None
    assert isinstance(decode_reply(frames.control), Failed)


def test_a_product_that_no_reply_can_carry_is_refused_before_it_is_computed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "MAX_FRAME_BYTES", 1000)
    for message, payload in ((GOOD, X4), (MultiplyPads(1, "qkv", 0, 1), ONE_KEY)):
        reply = answer(worker, message, payload)
        assert isinstance(reply, Failed)
        assert "limit" in reply.reason


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("digits", [2, 4])
def test_numbers_out_of_range_harm_nobody(kernel: DigitKernel, byte: int, digits: int) -> None:
    worker = Worker(store(kernel))
    greet(worker, FIELD)
    x = torch.full((2, HIDDEN * digits), byte, dtype=torch.uint8)  # as many bytes a number as it has digits
    got = product_of(worker, Product(1, "qkv", 0, 2, digits), x)  # type: ignore[arg-type]
    assert len(got) == 2 * linear_groups(CONFIG)["qkv"].out_features
    good = canonical(2, HIDDEN)
    got = product_of(worker, GOOD, good)
    assert torch.equal(got.long(), (reference(good, ("qkv", 0)) % P).flatten())


@pytest.mark.parametrize("path", ["float", "int8"])
def test_other_paths_refuse_the_calls_of_this_one(path: str) -> None:
    worker = Worker(store())
    greet(worker, Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", path))  # type: ignore[arg-type]
    for message, payload in ((GOOD, X4), (MultiplyPads(7, "qkv", 0, 1), ONE_KEY)):
        reply = answer(worker, message, payload)
        assert isinstance(reply, Failed)
        assert "field path" in reply.reason
    assert isinstance(answer(worker, Linear(1, "qkv", 0, None, 2), torch.zeros(2, HIDDEN)), Done)


def test_a_path_is_prepared_when_it_is_first_asked_for_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    for kind in (ModelWeights, FieldWorkerWeights):
        load = kind.load

        def counted(*arguments: object, load: object = load, **options: object) -> object:
            name = "field" if len(arguments) == 2 else str(arguments[1])
            loaded.append(name)
            return load(*arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(kind, "load", counted)
    worker = Worker(store())
    assert loaded == []
    dtypes = []
    for number, path in enumerate(["field", "float", "field", "int8", "float", "int8"]):
        welcome = greet(
            worker,
            Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", path),  # type: ignore[arg-type]
            peer=b"%d" % number,
        )
        assert isinstance(welcome, Welcome)
        dtypes.append(welcome.dtype)
    assert dtypes == ["field", "float32", "field", "int8", "float32", "int8"]
    assert loaded == ["field", "float32", "int8"]


def test_connections_of_several_paths_live_side_by_side(worker: Worker) -> None:
    greet(worker, HELLO, peer=b"float")
    frames = worker.answer(arrival(Linear(1, "qkv", 0, None, 2), torch.zeros(2, HIDDEN), peer=b"float"))
    assert frames is not None
    assert isinstance(decode_reply(frames.control), Done)
    assert isinstance(answer(worker, GOOD, X4), Done)
    greet(worker, HELLO, peer=PEER)  # the same connection may say another hello: then it is of that path
    assert isinstance(answer(worker, GOOD, X4), Failed)


def test_a_model_without_a_field_path_is_refused_and_floats_still_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "MAX_FIELD_TERMS", 63)
    worker = Worker(store())
    refused = greet(worker, FIELD)
    assert isinstance(refused, Refused)
    assert "group qkv of layer 0 has 64 inputs" in refused.reason
    assert isinstance(answer(worker, GOOD, X4), Failed)
    assert isinstance(greet(worker, HELLO), Welcome)


def test_digests_are_hashes_of_all_layers_in_order() -> None:
    welcome = greet(Worker(store()), FIELD)
    assert isinstance(welcome, Welcome)
    expected = {}
    for name, group in linear_groups(CONFIG).items():
        layers = [None] if name == "lm_head" else range(CONFIG.num_layers)
        whole = b"".join(
            quantise_rows(CHECKPOINT.tensor(part_tensor(layer, part, "weight"))).values.numpy().tobytes()
            for layer in layers
            for part, _ in group.parts
        )
        expected[name] = hashlib.sha256(whole).hexdigest()
    assert {shape.name: shape.digest for shape in welcome.groups} == expected
    assert set(expected) == {*LAYER_GROUPS, "lm_head"}


def test_other_paths_name_no_digests() -> None:
    welcome = greet(Worker(store()), HELLO)
    assert isinstance(welcome, Welcome)
    assert {shape.digest for shape in welcome.groups} == {None}


@pytest.mark.parametrize("layers", [[1], [0, 0], [0, 2]])
def test_digests_of_layers_out_of_order_are_refused(layers: list[int]) -> None:
    digests = GroupDigests()
    name: GroupName = "qkv"
    wq = torch.zeros(2, 2, dtype=torch.int8)
    for layer in layers[:-1]:
        digests.add((name, layer), wq)
    with pytest.raises(ValueError, match="expected"):
        digests.add((name, layers[-1]), wq)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    ("tensor", "label"),
    [("lm_head", "group lm_head has"), ("model.layers.1.self_attn.k_proj", "group qkv of layer 1 has")],
)
def test_weights_that_are_no_numbers_are_refused_by_group_and_layer(
    tensor: str, label: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CHECKPOINT.row_blocks

    def broken(name: str, *which: int) -> Iterator[tuple[int, torch.Tensor]]:
        for first, rows in read(name, *which):
            found = rows.clone()
            if name == f"{tensor}.weight" and first == 0:
                found[1, 2] = value
            yield first, found

    monkeypatch.setattr(CHECKPOINT, "row_blocks", broken)
    with pytest.raises(UnsupportedModel, match=label):
        FieldWorkerWeights.load(CHECKPOINT, CPU)


COMPILED = """
import tests.cached_loops
import torch
from tests.untrusted.calls import CHECKPOINT, HELLO, CONFIG, answer, greet
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.messages import PROTOCOL_VERSION, Done, Hello, MultiplyPads, Product
from tsqp.arith import digits, field as product, vnni
torch.set_num_threads(1)
HIDDEN, ONE_KEY = CONFIG.hidden_size, torch.zeros(32, dtype=torch.uint8)
worker = Worker(WeightStore(CHECKPOINT, "float32", torch.device("cpu")))
greet(worker, Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field"))
loops = [digits.split, digits.join, digits.clear_top_bits, vnni.sums_of_few, vnni.product_of_few, vnni._sums]
def compiled(): return [len(loop.signatures) for loop in loops]
before = compiled()
for least in (1024, 16):  # the second: products in several blocks of columns
    product._LEAST_COLUMNS, product._SUMS = least, 1
    for rows in (1, 2, 33):
        assert isinstance(answer(worker, Product(1, "qkv", 0, rows, 4), torch.zeros(rows, HIDDEN).int()), Done)
        assert isinstance(answer(worker, Product(1, "qkv", 0, rows, 2), torch.zeros(rows, HIDDEN).short()), Done)
        assert isinstance(answer(worker, MultiplyPads(1, "qkv", 0, rows), ONE_KEY.repeat(rows)), Done)
assert compiled() == before, (before, compiled())
"""


def test_no_call_waits_for_a_compiler() -> None:
    subprocess.run([sys.executable, "-c", COMPILED], check=True)  # a process that has no loop yet
