"""What the guard holds of a model: bounds that no product leaves, projections check vectors, digests of everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families import random_tokens, tiny_model
from tests.trusted.guard.altered import Altered, with_element
from tests.trusted.guard.fakes import make_groups
from tests.trusted.guard.hostile import HostileWorker, serve, serving
from tsqp import LLM
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.arith.field import MAX_SMALL, FieldWeights
from tsqp.arith.modulus import MAX_CENTRED, P
from tsqp.arith.product import BlockedKernel
from tsqp.arith.quantise import Int8Weights
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.config.groups import GroupKey
from tsqp.errors import ModelMismatch, ProductMismatch, ReplyRangeError, UnsupportedModel
from tsqp.model.decoder_layers import Norms
from tsqp.trusted.guard.weights import GuardedGroup, activation_limit
from tsqp.trusted.private import PrivateModel, load_private_model
from tsqp.untrusted.store import WeightStore

KEY: GroupKey = ("down", 7)
MODEL = str(tiny_model("llama-biases").directory)


def load(checkpoint: Checkpoint, *, keep_weights: bool = True) -> PrivateModel:
    table = checkpoint.tensor("model.embed_tokens.weight")
    norms = Norms.load(checkpoint, torch.float32)
    return load_private_model(checkpoint, table, norms, checks=2, keep_weights=keep_weights)


# The bound on activations


@given(
    columns=st.integers(1, 3000),
    rows=st.integers(1, 3),
    largest=st.integers(1, 127),
    seed=st.integers(0, 2**32 - 1),
    full=st.booleans(),
)
def test_no_product_within_the_limit_leaves_the_field(
    columns: int, rows: int, largest: int, seed: int, full: bool
) -> None:
    generator = np.random.default_rng(seed)
    wq = generator.integers(-largest, largest + 1, (rows, columns))
    if full:
        wq[0] = largest * generator.choice([-1, 1], columns)
    limit = activation_limit(KEY, torch.from_numpy(wq.astype(np.int8)))
    norm = max(sum(abs(int(w)) for w in row) for row in wq)
    assert limit * norm <= MAX_CENTRED
    assert limit == MAX_SMALL or (limit + 1) * norm > MAX_CENTRED
    assert 127 <= limit <= MAX_SMALL == 32_639
    worst = (np.sign(wq) * limit).astype(np.int16)  # for each row of weights the input that is worst for it
    out = torch.empty(rows, rows, dtype=torch.int32)
    weights = FieldWeights.of(torch.from_numpy(wq.astype(np.int8)), BlockedKernel())
    weights.product(torch.from_numpy(worst), 2, out=out)
    exact = worst.astype(np.int64) @ wq.T
    assert np.abs(exact).max() <= MAX_CENTRED
    assert (out.numpy().astype(np.int64) % P == exact % P).all()


@pytest.mark.parametrize(("columns", "limit"), [(66_572, 127), (66_573, None), (132_104, None)])
def test_the_edge_of_eight_bits(columns: int, limit: int | None) -> None:
    wq = torch.full((1, columns), 127, dtype=torch.int8)
    assert (MAX_CENTRED // (127 * columns) >= 127) == (limit is not None)
    if limit is not None:
        assert activation_limit(KEY, wq) == limit
        return
    with pytest.raises(UnsupportedModel, match="down of layer 7"):
        activation_limit(KEY, wq)
    with pytest.raises(UnsupportedModel, match="weights of group lm_head"):
        activation_limit(("lm_head", None), wq)


def test_zero_weights_have_a_limit() -> None:
    assert activation_limit(KEY, torch.zeros(2, 3, dtype=torch.int8)) == MAX_SMALL


class Constant(Checkpoint):
    """All weights 1, made when they are read: with so many columns their norm is too large."""

    def __init__(self, intermediate_size: int) -> None:
        small = replace(open_checkpoint(MODEL).config, num_layers=1, hidden_size=8, num_heads=4, num_kv_heads=2)
        super().__init__(replace(small, head_dim=2, intermediate_size=intermediate_size, mlp_bias=False), "constant")

    def _read(self, name: str) -> torch.Tensor:
        return torch.ones(self.shapes[name])

    def fingerprint(self) -> str:
        raise NotImplementedError

    def text_format(self) -> TextFormat:
        return TextFormat("", ())


@pytest.mark.parametrize(("columns", "why"), [(66_573, "levels"), (132_105, "132104")])
def test_too_many_columns_are_refused_by_name(columns: int, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"down.*layer 0.*{why}"):
        load(Constant(columns))
    assert load(Constant(1000)).groups["down", 0].in_features == 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "qkv.*layer 1"),
        ("model.layers.0.mlp.up_proj.bias", "gate_up.*layer 0"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_weights_that_are_not_numbers_are_refused_by_name(tensor: str, name: str, bad: float) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name}.*not finite"):
        load(Altered(open_checkpoint(MODEL), {tensor: with_element(bad)}))


# Check vectors


def projections(check_vectors: list[int], wq: list[list[int]]) -> list[int]:
    return [sum(s * row[i] for s, row in zip(check_vectors, wq, strict=True)) % P for i in range(len(wq[0]))]


def group_of(wq: torch.Tensor, checks: int = 2) -> GuardedGroup:
    return GuardedGroup.of(KEY, Int8Weights(wq, torch.ones(len(wq)), None), None, checks=checks)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (70, 33), (65_536, 2), (65_537, 3), (140_000, 2)], ids=str)
@pytest.mark.parametrize("fill", [None, 127, -127])
def test_folded_vectors_are_those_of_python(shape: tuple[int, int], fill: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    wq = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    if fill is not None:
        wq.fill_(fill)
    group = group_of(wq)
    assert (group.check_vectors < P).all()
    for check_vectors, got in zip(group.check_vectors, group.projections, strict=True):
        assert got.tolist() == projections(check_vectors.tolist(), wq.tolist())


def test_check_vectors_are_fresh_and_spread_over_the_field() -> None:
    wq = torch.ones(50_000, 1, dtype=torch.int8)
    first, second = group_of(wq), group_of(wq)
    rows = [*first.check_vectors, *second.check_vectors]
    for index, row in enumerate(rows):
        assert abs(float(row.mean()) / P - 0.5) < 0.01
        for other in rows[:index]:
            assert (row == other).mean() < 0.001


@pytest.mark.parametrize("checks", [1, 2, 7])
def test_there_are_as_many_vectors_as_asked_for(checks: int) -> None:
    groups, _ = make_groups(checks=checks)
    assert {group.check_vectors.shape[0] for group in groups.values()} == {checks}
    assert {group.projections.shape[0] for group in groups.values()} == {checks}


def test_forgotten_vectors_accept_nothing() -> None:
    groups, weights = make_groups()
    for key, group in groups.items():
        x = np.random.default_rng(0).integers(0, P, (4, group.in_features), dtype=np.uint32)
        y = (x.astype(np.int64) @ weights[key].numpy().astype(np.int64).T % P).astype(np.uint32)
        group.check_products(x, y)
        group.forget()
        for product in (y, np.zeros_like(y)):
            with pytest.raises(ProductMismatch):
                group.check_products(x, product)


@pytest.mark.parametrize("value", [P, P + 1, 2**32 - 1])
def test_products_that_are_not_canonical_never_agree(value: int) -> None:
    groups, _ = make_groups()
    group = groups["qkv", 0]
    x, y = np.zeros((2, 40), np.uint32), np.zeros((2, 24), np.uint32)
    group.check_products(x, y)
    y[1, 3] = value
    with pytest.raises(ReplyRangeError):
        group.check_products(x, y)


# Digests


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2  # the 8-bit weights stay, their scales do not


CHANGES = {
    "scale": ("model.layers.1.mlp.down_proj.weight", doubled),
    "bias": ("model.layers.0.self_attn.o_proj.bias", with_element(0.25)),
    "norm": ("model.layers.0.input_layernorm.weight", with_element(1.5)),
    "second norm": ("model.layers.1.post_attention_layernorm.weight", with_element(1.5)),
    "last norm": ("model.norm.weight", with_element(1.5)),
    "embedding": ("model.embed_tokens.weight", with_element(0.25)),
    "weights": ("model.layers.1.self_attn.v_proj.weight", with_element(0.01)),
    "head": ("lm_head.weight", with_element(0.01)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_model_digest_is_of_everything(name: str) -> None:
    tensor, change = CHANGES[name]
    before = load(Altered(open_checkpoint(MODEL)))
    after = load(Altered(open_checkpoint(MODEL), {tensor: change}))
    assert after.digest != before.digest
    assert (after.digests != before.digests) == (name in ("weights", "head"))


@pytest.mark.parametrize("which", ["q_norm", "k_norm"])
def test_norms_of_heads_are_in_it(which: str) -> None:
    checkpoint = open_checkpoint(str(tiny_model("qwen3").directory))
    change = {f"model.layers.1.self_attn.{which}.weight": with_element(3.0)}
    assert load(Altered(checkpoint, change)).digest != load(Altered(checkpoint)).digest


def test_numbers_of_the_configuration_are_in_it() -> None:
    checkpoint = open_checkpoint(MODEL)
    assert load(Altered(checkpoint, rms_norm_eps=1e-3)).digest != load(Altered(checkpoint)).digest


def test_it_is_the_same_each_time_and_with_a_dealer() -> None:
    checkpoint = open_checkpoint(MODEL)
    assert load(checkpoint).digest == load(checkpoint).digest == load(checkpoint, keep_weights=False).digest


@pytest.mark.parametrize("mode", ["verified", "masked"])
def test_a_pinned_digest(mode: ProtectionName) -> None:
    prompt = random_tokens(5)
    digest = load(open_checkpoint(MODEL)).digest
    with serve(MODEL) as (worker, address):
        for pinned in (digest, None):
            with LLM(MODEL, protection=mode, worker=address, guard=GuardConfig(model_digest=pinned)) as llm:
                llm.logits(prompt)
        products = worker.products
        other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
        with pytest.raises(ModelMismatch, match=digest):
            LLM(MODEL, protection=mode, worker=address, guard=GuardConfig(model_digest=other))
        assert worker.products == products


@pytest.mark.parametrize("mode", ["verified", "masked"])
@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.v_proj.weight", "lm_head.weight"])
def test_a_worker_with_other_weights_is_refused_before_any_call(mode: ProtectionName, tensor: str) -> None:
    """Even one whose fingerprint, which is of samples only, is right."""
    altered = Altered(open_checkpoint(MODEL), {tensor: with_element(0.01)})
    worker = HostileWorker(WeightStore(altered, "float32", torch.device("cpu")))
    with serving(worker) as address, pytest.raises(ModelMismatch, match="another model"):
        LLM(MODEL, protection=mode, worker=address)
    assert worker.products == 0
