"""Check vectors for one connection after another: each has its own, of the weights that were read first."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests.trusted.guard.altered import Altered, with_element
from tsqp.arith.modulus import P
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import ChannelClosed, CorruptCheckpoint, ProductMismatch
from tsqp.model.decoder_layers import Norms
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.trusted.private import PrivateModel, load_private_model

MODEL = "synthetic:tiny"


@pytest.fixture(params=[True, False], ids=["weights kept", "weights read again"])
def keeps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def never() -> bool:
    return False


def loaded(keep_weights: bool) -> PrivateModel:
    checkpoint = open_checkpoint(MODEL)
    norms, table = Norms.load(checkpoint, torch.float32), checkpoint.tensor("model.embed_tokens.weight")
    return load_private_model(checkpoint, table, norms, checks=2, keep_weights=keep_weights)


def check_a_product(group: GuardedGroup, model: PrivateModel) -> None:
    """A right product passes, and a wrong one does not."""
    weights = model.groups[group.key].weights
    assert weights is not None
    x = np.random.default_rng(1).integers(0, P, (3, group.in_features), dtype=np.uint32)
    out = torch.empty(3, group.out_features, dtype=torch.int32)
    weights.product(torch.from_numpy(x.view(np.int32)), 4, out=out)
    y = out.numpy().view(np.uint32)
    group.check_products(x, y)
    y[1, 0] ^= 1
    with pytest.raises(ProductMismatch):
        group.check_products(x, y)


def test_renewed_vectors_are_others_and_check_the_same_weights(keeps: bool) -> None:
    first, whole = loaded(keeps), loaded(True)
    second = first.renewed(open_checkpoint(MODEL), never)
    third = second.renewed(open_checkpoint(MODEL), never)
    assert (second.digest, second.digests) == (first.digest, first.digests)
    for key, group in second.groups.items():
        others = first.groups[key], third.groups[key]
        assert not any(np.array_equal(group.check_vectors, other.check_vectors) for other in others)
        assert (group.check_vectors < P).all()
        assert group.check_vectors.shape == others[0].check_vectors.shape
        assert group.limit == others[0].limit
        assert np.array_equal(group.scales, others[0].scales)
        assert np.array_equal(group.bias, others[0].bias)
        assert (group.weights is not None) == keeps
        check_a_product(group, whole)


def test_nothing_of_the_models_before_is_kept(keeps: bool) -> None:
    """Losses come one after another for as long as a server runs."""
    checkpoint, model = open_checkpoint(MODEL), loaded(keeps)
    counts = []
    for _ in range(4):
        model = model.renewed(checkpoint, never)
        gc.collect()
        counts.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
    assert counts[-1] < counts[0] + 3, "one more each time; those of other tests may go meanwhile"


def test_renewed_vectors_outlive_those_of_the_session_before(keeps: bool) -> None:
    first, whole = loaded(keeps), loaded(True)
    second = first.renewed(open_checkpoint(MODEL), never)
    first.forget()
    for group in second.groups.values():
        check_a_product(group, whole)
    second.forget()
    for group in second.groups.values():
        assert (group.projections == 1).all()


def test_weights_that_have_changed_on_the_disk_are_refused() -> None:
    changed = Altered(open_checkpoint(MODEL), {"model.layers.1.mlp.down_proj.weight": with_element(1000.0)})
    with pytest.raises(CorruptCheckpoint, match="changed"):
        loaded(False).renewed(changed, never)
    loaded(True).renewed(changed, never)  # nothing is read


def test_who_is_told_to_stop_reads_no_further_group() -> None:
    asked: list[bool] = []

    def at_the_third() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    def is_read(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("read after the end")

    later = Altered(open_checkpoint(MODEL), {"model.layers.1.self_attn.q_proj.weight": is_read})
    with pytest.raises(ChannelClosed):
        loaded(False).renewed(later, at_the_third)
    assert asked == [False, False, True]
