"""The model digest is of everything that this side loads, and a dealer's digests are compared like a worker's."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.families import tiny_model
from tests.trusted.guard.altered import Altered
from tests.trusted.guard.hostile import HostileWorker, serve, serving
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.places import Dialled
from tsqp.api.plan import Plan
from tsqp.api.private_links import PrivateLinks
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.config.model import ModelConfig, RopeConfig
from tsqp.errors import ModelMismatch
from tsqp.model.decoder_layers import Norms
from tsqp.trusted.private import ModelDigest, load_private_model
from tsqp.trusted.stats import Stats
from tsqp.untrusted.store import WeightStore
from tsqp.wire.transport import connect

MODEL = str(tiny_model("llama-biases").directory)
FAMILIES = ("llama-biases", "qwen3")  # biases, and norms of heads


def digest(checkpoint: Checkpoint) -> str:
    table = checkpoint.tensor("model.embed_tokens.weight")
    norms = Norms.load(checkpoint, torch.float32)
    return load_private_model(checkpoint, table, norms, checks=1, keep_weights=False).digest


def last_raised(tensor: torch.Tensor) -> torch.Tensor:
    """Its last element above all others of its row: at the end of what is hashed."""
    tensor.view(-1)[-1] = 9.0
    return tensor


def checkpoint_of(family: str) -> Checkpoint:
    return open_checkpoint(str(tiny_model(family).directory))


@cache
def unaltered(family: str) -> str:
    return digest(Altered(checkpoint_of(family)))


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in checkpoint_of(family).shapes]
)
def test_the_last_element_of_every_tensor_is_in_it(family: str, name: str) -> None:
    assert digest(Altered(checkpoint_of(family), {name: last_raised})) != unaltered(family)


TEXT: dict[str, Any] = {
    "tokenizer_json": "{}",
    "eos_token_ids": (1, 2, 3),
    "chat_template": "another template",
    "tool_chat_template": "another template",
    "special_tokens": {"bos_token": "another"},
}


def test_every_field_of_the_text_is_tried() -> None:
    assert set(TEXT) == {field.name for field in fields(TextFormat)}


@pytest.mark.parametrize("name", TEXT)
def test_all_that_makes_tokens_of_text_is_in_it(name: str) -> None:
    checkpoint = open_checkpoint(MODEL)
    assert getattr(checkpoint.text_format(), name) != TEXT[name]
    assert digest(Altered(checkpoint, text={name: TEXT[name]})) != digest(Altered(checkpoint))


def another(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "2"
    if value is None:
        return 1
    return (*value, 7) if isinstance(value, tuple) else value + 1


@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig) if field.name != "rope"])
def test_every_number_of_the_configuration_is_in_it(name: str) -> None:
    checkpoint = open_checkpoint(MODEL)
    same = Altered(checkpoint)
    other = Altered(checkpoint)
    other.config = replace(other.config, **{name: another(getattr(other.config, name))})
    assert ModelDigest(other).hexdigest({}) != ModelDigest(same).hexdigest({})


@pytest.mark.parametrize("name", [field.name for field in fields(RopeConfig)])
def test_every_number_of_the_rotary_embedding_is_in_it(name: str) -> None:
    checkpoint = open_checkpoint(MODEL)
    rope = replace(checkpoint.config.rope, **{name: another(getattr(checkpoint.config.rope, name))})
    assert digest(Altered(checkpoint, rope=rope)) != digest(Altered(checkpoint))


@pytest.mark.parametrize(
    "other",
    [
        ("b", torch.zeros(2, 3)),
        ("a", torch.zeros(3, 2)),
        ("a", torch.zeros(2, 3, dtype=torch.int32)),
        ("a", None),
        ("a", torch.tensor([[0.0] * 3, [0.0, 0.0, -0.0]])),
    ],
    ids=["name", "shape", "type", "none", "sign of zero"],
)
def test_a_tensor_counts_with_its_name_shape_and_type(other: tuple[str, torch.Tensor | None]) -> None:
    found = []
    for name, tensor in (("a", torch.zeros(2, 3)), other):
        whole = ModelDigest(open_checkpoint(MODEL))
        whole.add(name, tensor)
        found.append(whole.hexdigest({}))
    assert found[0] != found[1]


def test_the_digests_of_the_weights_are_in_it() -> None:
    checkpoint = open_checkpoint(MODEL)
    assert ModelDigest(checkpoint).hexdigest({"qkv": "a"}) != ModelDigest(checkpoint).hexdigest({"qkv": "b"})


@pytest.mark.parametrize("cheat", ["worker", "dealer"])
def test_neither_a_worker_nor_a_dealer_may_have_other_weights(cheat: str) -> None:
    """Not even one whose fingerprint, which is of samples only, is right."""
    altered = Altered(open_checkpoint(MODEL), {"model.layers.1.mlp.down_proj.weight": last_raised})
    cheats = HostileWorker(WeightStore(altered, "float32", torch.device("cpu")))
    run = RunConfig(MODEL, worker=WorkerConfig(deadline_s=60.0), guard=GuardConfig(pads_ahead=0))
    plan = Plan.of(run)  # no rule lets a user turn compiled kernels off here; test_mutants.py does
    plan = replace(plan, run=replace(run, compute=ComputeConfig(prefill_chunk=64, compiled_kernels=False)))
    with serve(MODEL) as (honest, right), serving(cheats) as wrong:
        addresses = {"worker": right, "dealer": right, cheat: wrong}
        with pytest.raises(ModelMismatch, match=f"the {cheat} at .* another model"):
            PrivateLinks(
                open_checkpoint(MODEL), plan, lambda _: [Dialled(connect(addresses["dealer"]))], Stats()
            ).connect(lambda _: [Dialled(connect(addresses["worker"]))], Until())
        assert honest.products == cheats.products == 0
