"""The formula of docs/scaling.md, each part by itself, against sums done by hand."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.numbers import SHM, SLOW, TINY, WEIGHTS_LAYER, X_LAYER, Y_LAYER, constants, model
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.config.tiling import MOST_SLICES
from tsqp.plan import cluster, memory, pads, passes
from tsqp.plan.cluster import WINDOW_BYTES, Link, Setting, Team
from tsqp.plan.constants import FEW_ROWS, NumberTimes, ProductTimes
from tsqp.plan.passes import Parts, calls_of, in_tee, numbers_by_part, numbers_of, scaled, weights_of

X, Y, WEIGHTS = 2 * X_LAYER + 64, 2 * Y_LAYER + 512, 2 * WEIGHTS_LAYER + 64 * 512
ONE_NUMBER = {"masked": NumberTimes(1.0, 100.0), "verified": NumberTimes(0.0, 0.0)}


def test_counts_of_a_model() -> None:
    assert calls_of(TINY) == 9
    assert numbers_of(TINY) == (X, Y)
    assert numbers_by_part(TINY) == ((2 * X_LAYER, 2 * Y_LAYER), (64, 512))
    assert weights_of(TINY) == (2 * WEIGHTS_LAYER, 64 * 512)


def test_a_call_costs_by_where_it_is_made() -> None:
    known = constants(call_s={"step": 1.0, "shm": 10.0, "tcp": 100.0})
    assert model(known).decode().calls == 9
    assert model(known).prefill().calls == 90
    assert model(known, link=Link(1e9)).decode().calls == 900
    assert model(known, batch=17).decode().calls == 90  # more rows than the compiled step takes


def test_each_worker_more_costs_a_call_more() -> None:
    known = constants(further_call_s={"shm": 1.0, "tcp": 5.0})
    assert model(known, Team(columns=4)).decode().calls == 9 * 3
    assert model(known, Team(layers=2)).decode().calls == 0
    assert model(known, Team(columns=2, replicas=3), batch=128).decode().calls == 9 * (2 * 2 - 1)  # 64 rows for each
    assert model(known, Team(replicas=8), batch=1000).decode().calls == 9 * (4 - 1)  # no more than four


def test_a_team_has_no_compiled_step() -> None:
    known = constants(call_s={"step": 1.0, "shm": 10.0, "tcp": 100.0, "team_shm": 1e3, "team_tcp": 1e4})
    for team in (Team(columns=2), Team(layers=2), Team(replicas=2)):
        assert model(known, team).decode().calls == model(known, team).prefill().calls == 9e3
        assert model(known, team, link=Link(1e9)).decode().calls == 9e4


def test_what_the_formula_says_of_the_code_is_so() -> None:
    from tsqp.api.roster_place import MOST_REPLICAS
    from tsqp.api.rules import MAX_CHECKS
    from tsqp.arith.expand import KEY_BYTES
    from tsqp.trusted.decode_step import MOST_ROWS
    from tsqp.trusted.filler import HEAD_ROWS
    from tsqp.trusted.guard.pool import MAKE_BLOCKS
    from tsqp.trusted.remote.team import SHARE_ROWS
    from tsqp.wire.roster import MOST_MEMBERS

    assert (cluster.MOST_WORKERS, cluster.MOST_CHECKS) == (MOST_MEMBERS, MAX_CHECKS)
    assert (passes.SHARE_ROWS, passes.MOST_REPLICAS, FEW_ROWS) == (SHARE_ROWS, MOST_REPLICAS, MOST_ROWS)
    assert pads.PAD_ROWS == MAKE_BLOCKS * BLOCK_ROWS
    assert (memory.BLOCK_ROWS, memory.HEAD_ROWS, memory.KEY_BYTES) == (BLOCK_ROWS, HEAD_ROWS, KEY_BYTES)


def test_numbers_are_those_of_x_and_y() -> None:
    known = constants(number_s=ONE_NUMBER)
    assert model(known).decode().numbers == X + Y
    assert model(known, batch=5).decode().numbers == 5 * (X + Y)
    prompt = model(known).prefill().numbers
    assert prompt == 32 * 2 * (X_LAYER + Y_LAYER) * 100 + (64 + 512)  # of the head one row


def test_a_row_of_a_prompt_costs_beside_its_numbers() -> None:
    times = NumberTimes(0.0, 0.0, row=1.0)
    known = constants(number_s={"masked": times, "verified": times})
    assert model(known).prefill().numbers == 32 * 8  # calls of layers; of the head there is one row
    assert model(known, batch=17).decode().numbers == 17 * 9
    assert model(known, batch=16).decode().numbers == 0
    assert model(known, cores=4).prefill().numbers == 32 * 8  # slices are handed out in Python, one after another


def test_a_number_of_few_rows_comes_from_memory_once_for_all_of_them() -> None:
    times = NumberTimes(1.0, 0.0, once=100.0)
    known = constants(number_s={"masked": times, "verified": times})
    assert model(known).decode().numbers == (X + Y) * 101
    assert model(known, batch=5, cores=4).decode().numbers == (X + Y) * 105
    assert model(known, Team(columns=3)).decode().numbers == (X + Y) + (3 * X + Y) * 100
    assert model(known, batch=17).decode().numbers == 0


def test_cores_share_slices_of_sixteen_rows() -> None:
    known = constants(number_s=ONE_NUMBER)
    one, four = (model(known, cores=cores, prompt=32).prefill().numbers - 576 for cores in (1, 4))
    assert one == 2 * four  # 32 rows are two slices


def test_each_column_has_projections_of_its_own() -> None:
    known = constants(dot_s=1.0)
    assert model(known, Team(columns=1)).decode().numbers == 0
    assert model(known, Team(columns=3), checks=5).decode().numbers == X * 2 * 5
    assert model(known, Team(layers=3), checks=5).decode().numbers == 0


def test_bytes_go_to_each_column_and_come_back_once() -> None:
    found = model(constants(), Team(columns=2), link=Link(1e6)).decode()
    assert found.sending == pytest.approx(4 * X * 2 / 1e6)
    assert found.receiving == pytest.approx(4 * Y / 1e6)
    clear = model(constants(), link=Link(1e6), mode="verified").decode()
    assert clear.sending == pytest.approx(2 * X / 1e6)
    assert clear.receiving == pytest.approx(4 * Y / 1e6)


def test_replicas_do_not_send_more() -> None:
    one, more = (model(constants(), Team(replicas=r), link=Link(1e6), batch=256).decode() for r in (1, 4))
    assert (one.sending, one.receiving) == (more.sending, more.receiving)


def test_a_connection_is_no_faster_than_its_window() -> None:
    assert SLOW.rate_of(1) == 1e6
    far = Link(1e12, 2.0)
    assert far.rate_of(1) == WINDOW_BYTES / 2
    assert far.rate_of(8) == 4 * WINDOW_BYTES
    assert model(constants(), link=SLOW).decode().round_trips == 9 * 0.5
    assert asdict(model(constants(), link=SHM).decode()) == asdict(Parts())


def test_each_connection_enciphers_by_itself() -> None:
    known, both = constants(byte_s=1.0, plain_byte_s=0.25), 4 * (X + Y)
    assert model(known, link=Link(1e30)).decode().wire == pytest.approx(both)
    assert model(known, link=Link(1e30, plain=True)).decode().wire == pytest.approx(both / 4)
    assert model(known).decode().wire == 0
    two = model(known, Team(columns=2), link=Link(1e30), cores=2).decode().wire
    assert two == pytest.approx(4 * (2 * X + Y) / 2)
    one_core = model(known, Team(columns=8), link=Link(1e30), cores=1).decode().wire
    assert one_core == pytest.approx(4 * (8 * X + Y) / 2)


def test_a_team_puts_the_bytes_together_one_after_another() -> None:
    known = constants(team_byte_s=1.0)
    assert model(known, cores=8).decode().wire == 0
    assert model(known, Team(layers=2), cores=8).decode().wire == 4 * (X + Y)
    assert model(known, Team(columns=3), cores=8).decode().wire == 4 * (3 * X + Y)
    assert model(known, Team(columns=3), link=Link(1e30)).decode().wire == 4 * (3 * X + Y)


def test_a_lost_packet_is_waited_for() -> None:
    found = model(constants(), Team(columns=2), link=Link(1e9, loss=0.01)).decode()
    assert found.losses == pytest.approx(9 * 4 * 0.01 * passes.LOST_S)
    assert model(constants(), link=Link(1e9, loss=0.9)).decode().losses == pytest.approx(9 * passes.LOST_S)


def test_a_product_reads_weights_and_multiplies() -> None:
    worker = ProductTimes(call_s=1.0, weight_s=10.0, few_s=1.0, many_s=2.0)
    step = model(constants(worker), batch=3).decode()
    assert (step.launches, step.reading, step.multiplying) == (9, 10 * WEIGHTS, 3 * WEIGHTS)
    divided = model(constants(worker), Team(columns=2), batch=3).decode()
    assert (divided.launches, divided.reading, divided.multiplying) == (9, 5 * WEIGHTS, 3 * WEIGHTS / 2)
    shared = model(constants(worker), Team(replicas=3), batch=200).decode()
    assert (shared.reading, shared.multiplying) == (10 * WEIGHTS, 67 * 2 * WEIGHTS)  # 67 rows for the busiest


def test_many_rows_never_take_less_than_sixteen() -> None:
    product = ProductTimes(0.0, 1.0, 1.0, 0.5)
    assert [product.seconds(1, rows, 9) for rows in (1, 16, 17, 64)] == [2.0, 17.0, 17.0, 33.0]


def test_numbers_of_many_rows_count_beside_weights() -> None:
    product = ProductTimes(0.0, 1.0, 1.0, 0.5, number_s=2.0)
    assert [product.seconds(10, rows, 3) for rows in (16, 32)] == [170.0, 10 * (1 + 16) + 3 * 32 * 2]
    worker = ProductTimes(0.0, 0.0, 0.0, 0.0, number_s=1.0)
    assert model(constants(worker)).prefill().multiplying == 32 * 2 * (X_LAYER + Y_LAYER)
    assert model(constants(worker), Team(columns=2)).prefill().multiplying == 32 * 2 * (X_LAYER + Y_LAYER / 2)
    assert model(constants(worker), batch=16).decode().multiplying == 0


@given(*(st.floats(0, 1) for _ in range(4)), st.integers(1, 5000))
def test_a_row_more_never_takes_less(weight_s: float, few_s: float, many_s: float, number_s: float, rows: int) -> None:
    product = ProductTimes(0.0, weight_s, few_s, many_s, number_s)
    assert product.seconds(7, rows, 5) <= product.seconds(7, rows + 1, 5)


@given(
    st.integers(1, 64),
    st.integers(1, MOST_SLICES),
    st.integers(1, 4),
    st.sampled_from([SHM, Link(1e8, 0.01)]),
    st.integers(1, 8),
)
def test_more_cores_and_a_faster_worker_never_take_longer(
    batch: int, columns: int, replicas: int, link: Link, cores: int
) -> None:
    worker = ProductTimes(1e-6, 1e-9, 1e-10, 1e-10)
    known = constants(worker, dot_s=1e-9, byte_s=1e-9, cache_byte_s=1e-9, flop_s=1e-9, number_s=ONE_NUMBER)
    team = Team(columns, 1, replicas)
    now = model(known, team, link=link, batch=batch, cores=cores)
    better = model(known, team, link=link, batch=batch, cores=cores + 1, worker_cores=4)
    assert better.decode().total <= now.decode().total
    assert better.prefill().total <= now.prefill().total


def test_attention_reads_caches_in_a_step_and_multiplies_in_a_prompt() -> None:
    known = constants(cache_byte_s=1.0, flop_s=1.0)
    assert model(known, batch=3, cores=2).decode().attention == 3 * 32 * (2 * 2 * 2 * 16 * 2) / 2
    assert model(known, cores=2).prefill().attention == 4 * 2 * 64 * (32 * 33 // 2) / 2


def test_chunks_make_the_calls_of_layers_again() -> None:
    known = constants(call_s={"step": 0.0, "shm": 1.0, "tcp": 0.0})
    assert model(known, prompt=32, chunk=16).prefill().calls == 2 * 8 + 1
    assert model(known, prompt=33, chunk=16).prefill().calls == 3 * 8 + 1
    assert model(known, prompt=32, micro_batches=4).prefill().calls == 4 * 8 + 1


def test_micro_batches_overlap_all_but_the_busiest() -> None:
    parts = Parts(calls=1.0, numbers=1.0, sending=2.0, receiving=1.0, round_trips=1.0, multiplying=6.0)
    assert parts.overlapped(1) == parts.total == 12
    assert parts.overlapped(3) == 6 + 2
    assert parts.largest == "multiplying"


def test_a_chunk_of_few_rows_has_no_more_parts_than_rows() -> None:
    known = constants(ProductTimes(3.0, 0.0, 0.0, 0.0), call_s=dict.fromkeys(("step", "shm", "tcp"), 1.0))
    for prompt in (1, 3, 8):
        one = model(known, prompt=prompt, micro_batches=8)
        assert one.prefill_s() == one.prefill().overlapped(prompt)
    last = model(known, prompt=17, chunk=16, micro_batches=8)  # of the last chunk there is one row
    assert last.prefill_s() == pytest.approx(8 * 8 * (3 + 1 / 8) + 9 * (3 + 1))
    assert last.prefill_s() <= last.prefill().total == 9 * 8 * 4 + 4


def test_attention_of_chunks_is_that_of_the_prompt() -> None:
    known = constants(flop_s=1.0)
    assert model(known, prompt=33, chunk=16).prefill() == model(known, prompt=33).prefill()


def test_cores_of_a_worker_are_not_those_of_a_gpu() -> None:
    product = ProductTimes(1.0, 2.0, 4.0, 8.0, 16.0)
    assert scaled(product, 2, 8) == ProductTimes(1.0, 0.5, 1.0, 2.0, 4.0)
    assert scaled(product, None, 8) == product
    assert scaled(product, 2, None) == product


def test_everything_in_the_tee_takes_its_products_and_attention() -> None:
    alone = ProductTimes(1e9, 1.0, 0.5, 2.0, 3.0)  # what a call takes is left out, in favour of the TEE
    known = constants(alone=alone, alone_flop_s=1e9, flop_s=1.0, cache_byte_s=1.0)
    setting = Setting(TINY, "masked", SHM, 4, "cpu", batch=2, prompt=32)
    prompt_s, step_s = in_tee(known, setting)
    flop = 4 * 2 * 64 * (32 * 33 // 2)
    layers, head = 2 * WEIGHTS_LAYER, 64 * 512
    numbers = 2 * (X_LAYER + Y_LAYER)
    products = layers * (1 + 2 * 32) + numbers * 32 * 3 + head * 1.5
    assert prompt_s == pytest.approx(products / 2 + flop / 4)  # measured on two cores
    assert step_s == pytest.approx((layers + head) * 2 / 2 + 2 * 32 * 256 / 4)
