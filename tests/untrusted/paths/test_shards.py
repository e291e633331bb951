"""A worker that holds a shard: its products are columns of the whole ones to the bit, and it has nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache

import pytest
import torch
from msgspec.structs import replace

from tests.arith.kernels import CPU, KERNELS
from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, answer, arrival, greet
from tests.untrusted.many_devices import fake_devices, owned_store
from tests.untrusted.patient_calls import PatientCalls
from tests.wire.links import WAIT_S
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.field import MAX_SMALL, Digits
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.config.groups import GroupKey, group_keys, linear_groups
from tsqp.config.shard import Shard, check_tiling, whole
from tsqp.errors import ModelMismatch, OptionError
from tsqp.model.quantised import ShardDigests, load_quantised_group
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.untrusted.paths.field import FieldWorkerWeights
from tsqp.untrusted.paths.many_weights import check_features
from tsqp.untrusted.store import ManyStore, WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.codec import decode_reply
from tsqp.wire.messages import PROTOCOL_VERSION, Done, Failed, Hello, MultiplyPads, Product, Refused, Welcome
from tsqp.wire.payload import tensor_bytes
from tsqp.wire.transport import connect, listen, new_shm_address

FIELD = Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field")
TILINGS = {
    "halves": ["0..3/0..1of2", "0..3/1..2of2"],
    "uneven": ["0..3/0..2of5", "0..3/2..3of5", "0..3/3..5of5"],
    "layers": ["0..1", "1..3"],
    "layers and columns": ["0..1/0..1of3", "0..1/1..3of3", "1..2", "2..3/0..1of7", "2..3/1..7of7"],
    "narrow": ["0..3/0..1of64", "0..3/1..63of64", "0..3/63..64of64"],
}


def shards_of(tiling: str) -> list[Shard]:
    return check_tiling([Shard.parse(text) for text in TILINGS[tiling]], CONFIG)


def worker_of(shard: Shard | None, kernel: DigitKernel | None = None) -> Worker:
    worker = Worker(WeightStore(CHECKPOINT, "float32", CPU, kernel=kernel, shard=shard))
    assert isinstance(greet(worker, FIELD), Welcome)
    return worker


@cache
def whole_weights(key: GroupKey) -> torch.Tensor:
    return load_quantised_group(CHECKPOINT, key).wq.double()


def rows_of(key: GroupKey, rows: int, digits: Digits) -> torch.Tensor:
    """Numbers mod p as the bits of uint32, or small ones; the extremes are among them."""
    random = torch.Generator().manual_seed(rows)
    shape = rows, linear_groups(CONFIG)[key[0]].in_features
    if digits == 4:
        x = torch.randint(0, P, shape, generator=random, dtype=torch.int32)
        x[0, :4] = torch.tensor([0, P - 1, P // 2, P // 2 + 1])
        return x
    x = torch.randint(-MAX_SMALL, MAX_SMALL + 1, shape, generator=random, dtype=torch.int16)
    x[0, :2] = torch.tensor([MAX_SMALL, -MAX_SMALL])
    return x


def expected(key: GroupKey, x: torch.Tensor) -> torch.Tensor:
    """The whole product (rows, out) mod p: float64 holds sums of 128 products of 31 and 7 bits."""
    return (x.double() @ whole_weights(key).t()).long() % P


def product_of(worker: Worker, message: Product | MultiplyPads, payload: torch.Tensor, rows: int) -> torch.Tensor:
    frames = worker.answer(arrival(message, payload))
    assert frames is not None
    assert isinstance(decode_reply(frames.control), Done)
    return torch.frombuffer(bytearray(frames.tensors[0]), dtype=torch.int32).long().view(rows, -1)


def check_columns(shards: list[Shard], workers: list[Worker], rows: int) -> None:
    """Side by side, the workers' products are the whole product, for every group of every layer."""
    for key in group_keys(CONFIG):
        holders = [worker for shard, worker in zip(shards, workers, strict=True) if shard.has(key, CONFIG)]
        digits: Digits
        for digits in (2, 4):
            x = rows_of(key, rows, digits)
            slices = [product_of(worker, Product(1, *key, rows, digits), x, rows) for worker in holders]
            assert torch.equal(torch.cat(slices, dim=1), expected(key, x)), (key, rows, digits)


@pytest.mark.parametrize("tiling", TILINGS)
def test_slices_side_by_side_are_the_whole_product(tiling: str) -> None:
    """At every number of rows from 1 to 40, as the guard's calls have."""
    shards = shards_of(tiling)
    workers = [worker_of(shard) for shard in shards]
    for rows in range(1, 41):
        check_columns(shards, workers, rows)


@pytest.mark.parametrize("kernel", KERNELS)
def test_whatever_the_kernel(kernel: DigitKernel) -> None:
    shards = shards_of("uneven")
    workers = [worker_of(shard, kernel) for shard in shards]
    for rows in (1, 3, 16, 33):
        check_columns(shards, workers, rows)


def test_dealt_slices_side_by_side_are_those_of_a_whole_dealer() -> None:
    shards = shards_of("layers and columns")
    workers, one = [worker_of(shard) for shard in shards], worker_of(None)
    keys = torch.randint(0, 256, (3, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    for key in group_keys(CONFIG):
        holders = [worker for shard, worker in zip(shards, workers, strict=True) if shard.has(key, CONFIG)]
        call = MultiplyPads(1, *key, 3)
        slices = [product_of(worker, call, keys, 3 * BLOCK_ROWS) for worker in holders]
        assert torch.equal(torch.cat(slices, dim=1), product_of(one, call, keys, 3 * BLOCK_ROWS))


def test_a_welcome_has_the_slices_and_their_digests() -> None:
    shards = shards_of("layers and columns")
    digests = ShardDigests(shards, CONFIG)
    for key in group_keys(CONFIG):
        digests.add(key, load_quantised_group(CHECKPOINT, key).wq)
    for shard, found in digests.hexdigests().items():
        welcome = greet(worker_of(shard), FIELD)
        assert isinstance(welcome, Welcome)
        assert welcome.shard == str(shard)
        assert {group.name: group.digest for group in welcome.groups} == found
        widths = {group.name: shard.width(group) for group in shard.groups(CONFIG)}
        assert {group.name: group.out_features for group in welcome.groups} == widths


def test_a_shard_that_is_all_of_the_model_is_a_worker_like_any_other() -> None:
    plain = greet(worker_of(None), FIELD)
    assert greet(worker_of(whole(CONFIG)), FIELD) == plain
    assert isinstance(plain, Welcome)
    assert plain.shard is None


NOT_THERE: list[GroupKey] = [("qkv", 0), ("lm_head", None), ("qkv", 2), ("qkv", None)]


@pytest.mark.parametrize("key", NOT_THERE)
def test_what_a_shard_does_not_hold_fails_and_the_next_call_works(key: GroupKey) -> None:
    worker = worker_of(Shard(1, 2))
    x, dealt = torch.zeros(2, CONFIG.hidden_size, dtype=torch.int32), torch.zeros(32, dtype=torch.uint8)
    for reply in (answer(worker, Product(1, *key, 2, 4), x), answer(worker, MultiplyPads(1, *key, 1), dealt)):
        assert isinstance(reply, Failed)
        assert "no group" in reply.reason
    assert isinstance(answer(worker, Product(1, "qkv", 1, 2, 4), x), Done)


@pytest.mark.parametrize("path", ["float", "int8"])
def test_a_shard_has_the_field_path_alone(path: str) -> None:
    worker = worker_of(Shard(0, 3, 0, 1, 2))
    refused = greet(worker, Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", path), peer=b"b")  # type: ignore[arg-type]
    assert isinstance(refused, Refused)
    assert refused.reason == f"it holds shard 0..3/0..1of2, which is for the private modes: it has no {path} path"
    assert isinstance(answer(worker, Product(1, "o", 0, 1, 4), torch.zeros(1, CONFIG.q_size).int()), Done)


def test_a_shard_that_the_model_does_not_have_is_refused_before_anything_is_read() -> None:
    for shard in (Shard(0, 4), Shard(0, 1, 0, 1, 1000)):
        for store in (
            lambda: WeightStore(CHECKPOINT, "float32", CPU, shard=shard),  # noqa: B023
            lambda: ManyStore(CHECKPOINT, "float32", fake_devices(2), shard=shard),  # noqa: B023
        ):
            with pytest.raises(OptionError, match="shard 0"):
                store()


def test_a_quarter_of_the_columns_is_a_quarter_of_the_memory() -> None:
    def held(shard: Shard | None) -> int:
        weights = FieldWorkerWeights.load(CHECKPOINT, CPU, kernel=BlockedKernel(), shard=shard)
        return sum(group.wq.nbytes for group in weights.groups.values())

    everything = held(None)
    assert [held(Shard(0, 3, part, part + 1, 4)) for part in range(4)] == [everything // 4] * 4
    assert held(Shard(0, 1)) + held(Shard(1, 2)) + held(Shard(2, 3)) == everything


class Counted(Worker):
    """Counts what was answered in Python."""

    in_python = 0

    def __init__(self, store: WeightStore, calls: PatientCalls) -> None:
        super().__init__(store, calls)
        self.calls = calls

    def answer(self, arrival: Arrival) -> Frames | None:
        self.in_python += 1
        return super().answer(arrival)


@contextmanager
def served(shard: Shard) -> Iterator[tuple[str, Counted]]:
    """A worker of a shard over shm, with the loop for calls that come again."""
    store = WeightStore(CHECKPOINT, "float32", CPU, kernel=FewRowsKernel(), shard=shard)
    with closing(listen(new_shm_address())) as listener, closing(PatientCalls()) as calls:
        worker = Counted(store, calls)
        worker.prepare("field")
        thread = threading.Thread(target=worker.serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield listener.address, worker
        finally:
            listener.interrupt()
            thread.join(WAIT_S)
        assert not thread.is_alive()


def session_with(address: str, shard: Shard | None) -> WorkerSession:
    digests = ShardDigests([shard or whole(CONFIG)], CONFIG)
    for key in group_keys(CONFIG):
        digests.add(key, load_quantised_group(CHECKPOINT, key).wq)
    (found,) = digests.hexdigests().values()
    return WorkerSession(
        connect(address),
        CONFIG,
        HELLO.fingerprint,
        wire_dtype="float32",
        dtype="float32",
        stats=Stats(),
        deadline_s=WAIT_S,
        path="field",
        digests=found,
        shard=shard,
    )


@pytest.mark.skipif(not FewRowsKernel.supported(), reason="no vpdpbusd here")
@pytest.mark.parametrize("text", ["1..3/1..3of7", "2..3", "0..3/0..1of64"])
def test_calls_that_come_again_are_answered_by_the_loop_with_the_same_bits(text: str) -> None:
    shard = Shard.parse(text)
    asked = 0
    with served(shard) as (address, worker):
        session = session_with(address, shard)
        for key in shard.keys(CONFIG):
            begin, stop = shard.columns(linear_groups(CONFIG)[key[0]].out_features)
            digits: Digits
            for digits in (2, 4):
                for rows in (1, 5):
                    x = rows_of(key, rows, digits)
                    slot = session.slot(x.nbytes, rows * (stop - begin) * 4)
                    for sent in (x, x.flip(0), x):
                        slot.tensor[:] = tensor_bytes(sent.contiguous())
                        reply = session.ask("linear", Product(session.next_id(), *key, rows, digits), slot).wait()
                        got = torch.frombuffer(bytearray(reply), dtype=torch.int32).long().view(rows, -1)
                        assert torch.equal(got, expected(key, sent)[:, begin:stop])
                        asked += 1
                        del reply
                    del slot
        # Hello and the first of three, and what came after the loop had waited in vain: this side may be slow.
        assert worker.in_python <= 1 + asked // 3 + worker.calls.waited
        session.ping()
        session.close()


def test_a_session_takes_the_shard_that_it_asks_for_and_no_other() -> None:
    shard = Shard(0, 3, 0, 1, 2)
    with served(shard) as (address, _):
        session_with(address, shard).close()
        for other in (None, Shard(0, 3, 1, 2, 2), Shard(0, 2)):
            with pytest.raises(ModelMismatch, match=r"holds shard 0\.\.3/0\.\.1of2, not"):
                session_with(address, other)


@pytest.mark.parametrize("count", [2, 3])
def test_several_devices_share_a_shard(count: int) -> None:
    """Slices of slices: also where a border of a shard lies within a device's tile."""
    shard, devices = Shard(1, 3, 1, 3, 5), fake_devices(count)
    worker, one = Worker(owned_store(devices, "field", shard=shard)), worker_of(shard)
    with torch.inference_mode(), devices.serving():
        welcome, of_one = greet(worker, FIELD), greet(one, FIELD)
        assert isinstance(welcome, Welcome)
        assert replace(welcome, device="cpu") == of_one
        for key in shard.keys(CONFIG):
            for rows in (1, 3, 33):
                x = rows_of(key, rows, 4)
                call = Product(1, *key, rows, 4)
                assert torch.equal(product_of(worker, call, x, rows), product_of(one, call, x, rows))
            pads = MultiplyPads(1, *key, 2)
            keys = torch.arange(64, dtype=torch.uint8).view(2, 32)
            assert torch.equal(product_of(worker, pads, keys, 32), product_of(one, pads, keys, 32))


def test_more_devices_than_a_slice_has_features_are_refused() -> None:
    shard = Shard(0, 3, 0, 1, 32)  # two features of the narrowest group
    check_features(CONFIG, 2, shard)
    with pytest.raises(OptionError, match="3 devices cannot share group o of this model, which has 2 output features"):
        check_features(CONFIG, 3, shard)
    check_features(CONFIG, 3, Shard(2, 3, 0, 1, 32))  # the head alone has more
