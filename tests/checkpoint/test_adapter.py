"""Adapters are read as they were saved, and what is malformed, hostile or of another model ends in one clear line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.adapters import PREFIX, SEVEN, write_adapter
from tests.families import tiny_model
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, is_adapter
from tsqp.config.groups import LAYER_GROUPS, linear_groups
from tsqp.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

LLAMA = tiny_model("llama")
CONFIG = open_checkpoint(str(LLAMA.directory)).config
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


def change_config(directory: Path, **settings: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)


def read(directory: Path) -> Any:
    return Adapter(directory).parts(CONFIG)


def test_every_matrix_of_every_layer_is_found(tmp_path: Path) -> None:
    found = read(write_adapter(tmp_path, LLAMA))
    groups = linear_groups(CONFIG)
    assert len(found) == 7 * CONFIG.num_layers
    for name in LAYER_GROUPS:
        for part, rows in groups[name].parts:
            for layer in range(CONFIG.num_layers):
                assert found[layer, part].a.shape == (4, groups[name].in_features)
                assert found[layer, part].b.shape == (rows, 4)


@pytest.mark.parametrize(
    ("given_", "scale"),
    [
        ({"alpha": 8.0}, 2.0),
        ({"alpha": 8.0, "use_rslora": True}, 4.0),
        ({"alpha": 8.0, "alpha_pattern": {"q_proj": 2.0}}, 0.5),
        ({"alpha": 8.0, "alpha_pattern": {"layers.0.self_attn.q_proj": 2.0, "q_proj": 40.0}}, 0.5),  # the first counts
        ({"alpha": 8.0, "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2.0}}, 0.5),
        ({"alpha": 8.0, "alpha_pattern": {"proj": 40.0}}, 2.0),  # no end of a name after a dot
        ({"alpha": 8.0, "ranks": {"q_proj": 2}}, 4.0),
        ({"alpha": 8.0, "ranks": {"q_proj": 16}, "use_rslora": True}, 2.0),
    ],
)
def test_the_scale_is_in_b(given_: dict[str, Any], scale: float, tmp_path: Path) -> None:
    found = read(write_adapter(tmp_path, LLAMA, **given_))
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(found[0, "self_attn.q_proj"].a, stored[f"{Q0}.lora_A.weight"])
    assert torch.equal(found[0, "self_attn.q_proj"].b, stored[f"{Q0}.lora_B.weight"] * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    found = read(write_adapter(tmp_path, LLAMA, dtype=dtype))[1, "mlp.down_proj"]
    assert found.a.dtype == found.b.dtype == torch.float32


def test_fused_matrices_are_parts_of_one(tmp_path: Path) -> None:
    """Phi-3 stores Q, K and V as one: each part has all of A and its own rows of B."""
    phi3 = tiny_model("phi3")
    config = open_checkpoint(str(phi3.directory)).config
    found = Adapter(write_adapter(tmp_path, phi3, targets=("qkv_proj",))).parts(config)
    b = load_file(tmp_path / WEIGHTS_FILE)[f"{PREFIX}model.layers.1.self_attn.qkv_proj.lora_B.weight"] * 2.0
    assert torch.equal(found[1, "self_attn.v_proj"].b, b[config.q_size + config.kv_size :])
    assert torch.equal(found[1, "self_attn.q_proj"].a, found[1, "self_attn.k_proj"].a)
    assert len(found) == 3 * config.num_layers


@pytest.mark.parametrize(
    "targets", [r".*\.(q_proj|v_proj)", "(a+)+$", "all-linear", "("], ids=["usual", "evil", "all", "none"]
)
def test_a_regular_expression_is_not_evaluated(targets: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, LLAMA, targets=("q_proj", "v_proj"), target_modules=targets)
    assert {part for _, part in read(tmp_path)} == {"self_attn.q_proj", "self_attn.v_proj"}


@pytest.mark.parametrize(
    "excluded",
    [["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "no_such"], r".*\.0\..*q_proj|.*1.*up_proj", "(a+)+$"],
    ids=["list", "expression", "evil"],
)
def test_modules_that_are_excluded_may_be_missing(excluded: object, tmp_path: Path) -> None:
    write_adapter(tmp_path, LLAMA, targets=("q_proj", "up_proj"), exclude_modules=excluded)
    change_tensors(
        tmp_path,
        lambda tensors: [
            tensors.pop(f"{PREFIX}model.layers.{module}.lora_{letter}.weight")
            for module in ("0.self_attn.q_proj", "1.mlp.up_proj")
            for letter in "AB"
        ],
    )
    assert set(read(tmp_path)) == {(1, "self_attn.q_proj"), (0, "mlp.up_proj")}


@pytest.mark.parametrize(
    ("excluded", "layer"), [(None, 0), ([], 0), ("", 0), (["proj"], 0), (["0.self_attn.q_proj"], 1)], ids=str
)
def test_modules_that_are_not_excluded_are_all_stored(excluded: object, layer: int, tmp_path: Path) -> None:
    write_adapter(tmp_path, LLAMA, targets=("q_proj", "k_proj"), exclude_modules=excluded)
    change_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name])
    with pytest.raises(CorruptCheckpoint, match=rf"model\.layers\.{layer}\.self_attn\.q_proj are missing"):
        read(tmp_path)


def test_some_layers(tmp_path: Path) -> None:
    assert {layer for layer, _ in read(write_adapter(tmp_path, LLAMA, layers=[1]))} == {1}


def test_the_digest_is_that_of_what_is_computed_with(tmp_path: Path) -> None:
    first = Adapter(write_adapter(tmp_path / "a", LLAMA))
    assert len(first.digest) == 64
    assert Adapter(write_adapter(tmp_path / "b", LLAMA, lora_dropout=0.5)).digest == first.digest
    others = [
        write_adapter(tmp_path / "c", LLAMA, seed=1),
        write_adapter(tmp_path / "d", LLAMA, alpha=9.0),
        write_adapter(tmp_path / "e", LLAMA, dtype=torch.bfloat16),
        write_adapter(tmp_path / "f", LLAMA, targets=SEVEN[:6]),
    ]
    assert len({first.digest, *(Adapter(other).digest for other in others)}) == 5
    assert first.ranks[Q0.removeprefix(PREFIX)] == 4
    assert first.parameters == sum(part.numel() for part in load_file(tmp_path / "a" / WEIGHTS_FILE).values())


def test_what_is_an_adapter(tmp_path: Path) -> None:
    assert is_adapter(write_adapter(tmp_path, LLAMA))
    assert not is_adapter(LLAMA.directory)


# Refused


@pytest.mark.parametrize(
    ("changed", "kind", "text"),
    [
        ({"peft_type": "IA3"}, UnsupportedModel, "'IA3'"),
        ({"peft_type": None}, UnsupportedModel, "None"),
        ({"peft_type": ["LORA"]}, UnsupportedModel, "LORA"),
        ({"use_dora": True}, UnsupportedModel, "use_dora"),
        ({"bias": "all"}, UnsupportedModel, "'all'"),
        ({"lora_bias": True}, UnsupportedModel, "lora_bias"),
        ({"fan_in_fan_out": True}, UnsupportedModel, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, UnsupportedModel, "layer_replication"),
        ({"trainable_token_indices": [3]}, UnsupportedModel, "trainable_token_indices"),
        ({"of tomorrow": {"x": 1}}, UnsupportedModel, "of tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModel, "pissa_niter_4"),
        ({"layers_pattern": "blocks"}, UnsupportedModel, "layers_pattern"),
        ({"alpha_pattern": {"(a+)+": 1}}, UnsupportedModel, "regular expression"),
        ({"target_modules": [*SEVEN, "lm_head"]}, UnsupportedModel, "'lm_head'"),
        ({"target_modules": [*SEVEN, "embed_tokens"]}, UnsupportedModel, "'embed_tokens'"),
        ({"target_modules": list(SEVEN[1:])}, CorruptCheckpoint, "q_proj is stored"),
        ({"exclude_modules": ["q_proj"]}, CorruptCheckpoint, "q_proj is stored"),
        ({"exclude_modules": [3]}, CorruptCheckpoint, "exclude_modules"),
        ({"exclude_modules": {"q_proj": True}}, CorruptCheckpoint, "exclude_modules"),
        ({"target_modules": None}, CorruptCheckpoint, "target_modules"),
        ({"target_modules": []}, CorruptCheckpoint, "target_modules"),
        ({"target_modules": [3]}, CorruptCheckpoint, "target_modules"),
        ({"target_modules": ["q_proj\nlying line"]}, CorruptCheckpoint, "target_modules"),
        ({"r": 5}, CorruptCheckpoint, "rank 4"),
        ({"r": 0}, CorruptCheckpoint, "r must"),
        ({"r": True}, CorruptCheckpoint, "r must"),
        ({"r": 1 << 40}, CorruptCheckpoint, "r must"),
        ({"lora_alpha": "8"}, CorruptCheckpoint, "lora_alpha"),
        ({"lora_alpha": float("nan")}, CorruptCheckpoint, "lora_alpha"),
        ({"lora_alpha": float("inf")}, CorruptCheckpoint, "lora_alpha"),
        ({"lora_alpha": 10**400}, CorruptCheckpoint, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": None}}, CorruptCheckpoint, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, CorruptCheckpoint, "rank 4"),
        ({"rank_pattern": [1]}, CorruptCheckpoint, "rank_pattern"),
        ({"use_rslora": "yes"}, CorruptCheckpoint, "use_rslora"),
        ({"layers_to_transform": ["0"]}, CorruptCheckpoint, "layers_to_transform"),
        ({"layers_to_transform": [0]}, CorruptCheckpoint, "layers.1"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(
    changed: dict[str, Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    change_config(write_adapter(tmp_path, LLAMA), **changed)
    with pytest.raises(kind, match=re.escape(text)) as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value)


def _pop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q0}.lora_B.weight"]


def _pop_both(tensors: dict[str, torch.Tensor]) -> None:
    _pop(tensors)
    del tensors[f"{Q0}.lora_A.weight"]


def _set(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (_pop, CorruptCheckpoint, "one of its two"),
        (_pop_both, CorruptCheckpoint, "layers.0.self_attn.q_proj are missing"),
        (dict.clear, CorruptCheckpoint, "no tensors"),
        (_set(f"{Q0}.lora_magnitude_vector", torch.ones(64)), UnsupportedModel, "DoRA"),
        (_set(f"{PREFIX}model.embed_tokens.lora_embedding_A", torch.ones(4, 320)), UnsupportedModel, "embed_tokens"),
        (_set("model.norm.weight", torch.ones(64)), UnsupportedModel, "model.norm"),
        (_set("evil\nline", torch.ones(1)), UnsupportedModel, "evil"),
        (_set(f"{Q0}.lora_B.weight", torch.ones(63, 4)), CorruptCheckpoint, "(64, 64)"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 65)), CorruptCheckpoint, "(64, 65)"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(5, 64)), CorruptCheckpoint, "no (r, in)"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(64)), CorruptCheckpoint, "no (r, in)"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.float64)), UnsupportedModel, "F64"),
        (_set(f"{Q0}.lora_A.weight", torch.full((4, 64), torch.nan)), CorruptCheckpoint, "numbers that are none"),
        (_set(f"{Q0}.lora_B.weight", torch.full((64, 4), torch.inf)), CorruptCheckpoint, "numbers that are none"),
        (_set(f"{Q0}.lora_B.weight", torch.full((64, 4), 3e38)), CorruptCheckpoint, "too large"),
    ],
)
def test_tensors_that_are_refused(change: Any, kind: type[Exception], text: str, tmp_path: Path) -> None:
    change_tensors(write_adapter(tmp_path, LLAMA), change)
    with pytest.raises(kind, match=re.escape(text)) as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_adapter_of_the_head_is_refused_by_name(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, LLAMA, targets=("lm_head",), target_modules="lm_head")
    with pytest.raises(UnsupportedModel, match="lm_head is none of the linear layers"):
        read(directory)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="qkv_proj is none of the linear layers"):
        read(write_adapter(tmp_path, tiny_model("phi3"), targets=("qkv_proj",)))


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=CONFIG_FILE):
        read(tmp_path / "nowhere")
    directory = write_adapter(tmp_path / "a", LLAMA)
    (directory / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointNotFound, match=WEIGHTS_FILE):
        read(directory)
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UnsupportedModel, match="pickle"):
        read(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = write_adapter(tmp_path_factory.mktemp("adapter"), LLAMA, targets=("q_proj",))
    return {name: (directory / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ANY_FILE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(data=st.data())
@ANY_FILE
def test_any_configuration_is_read_or_refused(data: st.DataObject, saved: dict[str, bytes], tmp_path: Path) -> None:
    config = json.loads(saved[CONFIG_FILE])
    for name in data.draw(st.lists(st.sampled_from([*config, "x"]), min_size=1, max_size=3)):
        config[name] = data.draw(JSON)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / WEIGHTS_FILE).write_bytes(saved[WEIGHTS_FILE])
    assert_read_or_one_line(tmp_path)


@given(data=st.data())
@ANY_FILE
def test_any_damage_is_read_or_refused(data: st.DataObject, saved: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in saved.items():
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, min(len(damaged), 1200) - 1))  # headers above all
            damaged[at] = data.draw(st.integers(0, 255))
        end = data.draw(st.none() | st.integers(0, len(damaged)))
        (tmp_path / name).write_bytes(damaged[:end])
    assert_read_or_one_line(tmp_path)


def assert_read_or_one_line(directory: Path) -> None:
    refused: CheckpointError | None = None
    try:
        read(directory)
    except CheckpointError as error:
        refused = error
    assert str(refused).isprintable()
