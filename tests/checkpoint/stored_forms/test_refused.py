"""What is not read is refused by name; what is damaged, in one line that names tensor and file."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.safetensors_files import SINGLE_FILE
from tsqp.checkpoint.stored_forms import stored_form
from tsqp.errors import CheckpointError, CorruptCheckpoint, UnsupportedModel

from .references import AWQ, GPTQ, INT4, ct_config

VECTORS = Path(__file__).parent / "vectors"
UP = "model.layers.0.mlp.up_proj"
CASES = (
    "awq",
    "bnb-int8",
    "bnb-nf4-nested",
    "ct-fp8-blocks",
    "ct-int4-zeros",
    "ct-w8a8",
    "fp8-blocks",
    "gptq-shuffled",
)


def with_group(**changes: Any) -> dict[str, Any]:
    config = ct_config("pack-quantized", INT4)
    config["config_groups"]["group_0"] |= changes
    return config


@pytest.mark.parametrize(
    ("quantisation", "named"),
    [
        ({"quant_method": "aqlm"}, "'aqlm'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": ["gptq"]}, "gptq"),
        ({"bits": 4}, "None"),
        (GPTQ | {"bits": 5}, "gptq of 5 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "'marlin'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        (AWQ | {"bits": 8}, "awq of 8 bits"),
        (AWQ | {"version": "GEMV"}, "'gemv'"),
        (AWQ | {"backend": "llm-awq"}, "'llm-awq'"),
        (ct_config("marlin-24", INT4), "'marlin-24'"),
        (ct_config("nvfp4-pack-quantized", INT4), "'nvfp4-pack-quantized'"),
        (ct_config("mixed-precision", INT4), "without a format"),
        (ct_config("pack-quantized", INT4 | {"num_bits": 3}), "3 bits"),
        (ct_config("pack-quantized", INT4 | {"type": "float"}), "'float'"),
        *(
            (ct_config(form, INT4 | {"num_bits": 8, "type": []}), r"type \[\]")
            for form in ("pack-quantized", "int-quantized")
        ),
        (ct_config("float-quantized", {"num_bits": 4, "type": "float"}), "4 bits"),
        (ct_config("int-quantized", {"num_bits": 8, "strategy": "tensor_group"}), "'tensor_group'"),
        (ct_config("pack-quantized", INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (ct_config("pack-quantized", INT4, transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (ct_config("pack-quantized", INT4) | {"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
    ],
)
def test_refused_by_name(quantisation: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named) as refused:
        stored_form({"quantization_config": quantisation}, "config.json")
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("quantisation", "named"),
    [
        (["gptq"], "must be an object"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        (GPTQ | {"bits": "4"}, "bits"),
        (GPTQ | {"group_size": 0}, "group_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (with_group(targets="Linear"), "targets"),
        (with_group(targets=["re:("]), "is no pattern"),
        (with_group(weights=[4]), "weights"),
        (with_group(weights={"num_bits": 4, "strategy": "group"}), "group_size"),
        (with_group(weights={"num_bits": 4, "strategy": "block"}), "block_structure"),
        (with_group(weights={"num_bits": 4, "strategy": "block", "block_structure": "128"}), "block_structure"),
    ],
)
def test_a_configuration_that_contradicts_itself(quantisation: Any, named: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=named) as refused:
        stored_form({"quantization_config": quantisation}, "config.json")
    assert "config.json" in str(refused.value)


def test_an_unknown_method_is_refused_before_weights_are_looked_for(tmp_path: Path) -> None:
    shutil.copy(VECTORS / "awq" / "config.json", tmp_path)
    configure(tmp_path, quant_method="quip")
    with pytest.raises(UnsupportedModel, match="'quip'"):
        open_checkpoint(str(tmp_path))


def copied(case: str, directory: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(VECTORS / case, directory, dirs_exist_ok=True)
    return load_file(VECTORS / case / SINGLE_FILE)


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def read_all(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    checkpoint.fingerprint()
    for name in checkpoint.shapes:
        checkpoint.tensor(name)


PARTS = [
    (case, part)
    for case in CASES
    for part in sorted(
        name.removeprefix(f"{UP}.")
        for name in load_file(VECTORS / case / SINGLE_FILE)
        if name.startswith(UP) and not name.endswith("weight_format")
    )
]


@pytest.mark.parametrize(("case", "part"), PARTS)
def test_each_part_of_another_shape_or_dtype_is_named(case: str, part: str, tmp_path: Path) -> None:
    tensors = copied(case, tmp_path)
    name = f"{UP}.{part}"
    for changed in (tensors[name].reshape(1, 1, -1).expand(2, -1, -1).contiguous(), tensors[name].to(torch.complex64)):
        save_file(tensors | {name: changed}, tmp_path / SINGLE_FILE)
        with pytest.raises(CheckpointError) as refused:
            read_all(tmp_path)
        assert name in str(refused.value)
        assert SINGLE_FILE in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("case", "part"), PARTS)
def test_a_missing_part_is_named(case: str, part: str, tmp_path: Path) -> None:
    tensors = copied(case, tmp_path)
    del tensors[f"{UP}.{part}"]
    save_file(tensors, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=UP):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("case", "part", "value", "named"),
    [
        ("gptq-shuffled", "g_idx", torch.full((32,), 2, dtype=torch.int32), "names groups"),
        ("gptq-shuffled", "g_idx", torch.full((32,), -1, dtype=torch.int32), "names groups"),
        ("ct-int4", "weight_shape", torch.tensor([32, 32]), "not"),
        ("bnb-int8", "weight_format", torch.tensor(3, dtype=torch.uint8), "layout of a GPU"),
    ],
)
def test_contents_that_cannot_be_are_named(
    case: str, part: str, value: torch.Tensor, named: str, tmp_path: Path
) -> None:
    tensors = copied(case, tmp_path)
    save_file(tensors | {f"{UP}.{part}": value}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=named) as refused:
        read_all(tmp_path)
    assert f"{SINGLE_FILE}: {UP}.{part}" in str(refused.value)


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 64]}
STATE |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\xff",
        "[" * 5000,
        json.dumps(STATE | {"shape": [64, 32]}),
        json.dumps(STATE | {"dtype": "complex64"}),
        json.dumps(STATE | {"dtype": ["float16"]}),
        json.dumps(STATE | {"blocksize": 0}),
        json.dumps(STATE | {"blocksize": 10**30}),
        json.dumps(STATE | {"blocksize": 32}),
        json.dumps(STATE | {"nested_offset": "0.5"}),
        json.dumps(STATE | {"nested_blocksize": -1}),
        json.dumps(STATE | {"nested_offset": float("nan")}),
        json.dumps({key: value for key, value in STATE.items() if not key.startswith("nested")}),
    ],
)
def test_the_state_of_four_bits_is_held_against_the_matrix(text: str, tmp_path: Path) -> None:
    tensors = copied("bnb-nf4-nested", tmp_path)
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.tensor(list(text.encode("latin-1")), dtype=torch.uint8)
    save_file(tensors, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: {UP}") as refused:
        read_all(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_module_needs_a_scheme_of_its_own_format(tmp_path: Path) -> None:
    copied("ct-int4", tmp_path)
    configure(tmp_path, ignore=["lm_head", r"re:.*\.up_proj$"])
    with pytest.raises(CorruptCheckpoint, match=f"{UP}.weight_packed is quantised, but"):
        open_checkpoint(str(tmp_path))
    configure(tmp_path, **ct_config("int-quantized", {"num_bits": 8, "strategy": "channel"}))
    with pytest.raises(CorruptCheckpoint, match=r"weight_packed is not stored as .* int-quantized"):
        open_checkpoint(str(tmp_path))


def test_a_scheme_is_found_by_name_then_by_pattern_then_by_class(tmp_path: Path) -> None:
    """The right one reads groups of 16; the others would ask for another number of scales."""
    copied("ct-int4", tmp_path)

    def scheme(size: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": INT4 | {"group_size": size}}

    others = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    named = [f"model.layers.0.{name}" for name in (*others, "mlp.gate_proj", "mlp.down_proj")]
    right = {"by name": (UP,), "by pattern": (r"re:.*\.up_.*",)}
    for way, target in right.items():
        wrong = ("Linear",) if way == "by pattern" else ("Linear", "re:.*up_proj")
        groups = {"a": scheme(32, *wrong), "b": scheme(16, *target, *named)}
        configure(tmp_path, config_groups=groups)
        read_all(tmp_path)
        configure(tmp_path, config_groups={"b": groups["b"], "a": groups["a"]})
        read_all(tmp_path)
    configure(tmp_path, config_groups={"a": scheme(32, UP), "b": scheme(16, "Linear")})
    with pytest.raises(CorruptCheckpoint, match=f"{UP}.weight_scale has shape"):
        open_checkpoint(str(tmp_path))


def test_quantising_on_the_way_is_refused(tmp_path: Path) -> None:
    tensors = copied("awq", tmp_path)
    for name in [name for name in tensors if name.endswith("qweight")]:
        module = name.removesuffix(".qweight")
        rows = tensors.pop(f"{module}.scales").shape[1]
        inputs = tensors.pop(name).shape[0]
        del tensors[f"{module}.qzeros"]
        tensors[f"{module}.weight"] = torch.ones(rows, inputs)
    save_file(tensors, tmp_path / SINGLE_FILE)
    with pytest.raises(UnsupportedModel, match="stores no matrix so"):
        open_checkpoint(str(tmp_path))


MUTATED_DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.int64, torch.bool]
MUTATED_DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CASES), st.data())
def test_no_header_crashes(tmp_path: Path, case: str, data: st.DataObject) -> None:
    """Tensors of any name are dropped, cut, made anew or renamed: what is read is read, else refused."""
    tensors = copied(case, tmp_path)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(name for name, tensor in tensors.items() if tensor.numel())))
        match data.draw(st.sampled_from(["drop", "anew", "rename", "bits"])):
            case "drop":
                del tensors[name]
            case "rename":
                tensors[data.draw(st.sampled_from(sorted(tensors)))] = tensors.pop(name)
            case "anew":
                shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 16, 32, 64]), max_size=3))
                tensors[name] = torch.ones(shape).to(data.draw(st.sampled_from(MUTATED_DTYPES)))
            case "bits":
                tensor, random = tensors[name], np.random.default_rng(data.draw(st.integers(0, 2**32)))
                noise = torch.from_numpy(random.integers(0, 256, tensor.numel() * tensor.element_size(), np.uint8))
                tensors[name] = noise.view(tensor.dtype).reshape(tensor.shape)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / SINGLE_FILE)
    with suppress(CheckpointError):
        read_all(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["re:(", "-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CASES), st.data())
def test_no_configuration_crashes(tmp_path: Path, case: str, data: st.DataObject) -> None:
    """Any value takes any other's place, at any depth."""
    shutil.copytree(VECTORS / case, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    place: Any = config["quantization_config"]
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(VALUES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with suppress(CheckpointError):
        read_all(tmp_path)
