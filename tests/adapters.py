"""LoRA adapters as PEFT saves them, of random numbers, and models that have them merged into their weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.families import TinyModel, byte_tokenizer, tiny_model
from tests.session_directory import session_directory

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


def linear_modules(model: TinyModel, targets: Sequence[str]) -> dict[str, torch.nn.Linear]:
    """The linear layers of transformers' model whose names end so."""
    return {
        name: module
        for name, module in model.oracle.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
    }


def write_adapter(
    directory: Path,
    model: TinyModel,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = SEVEN,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    ranks: dict[str, int] | None = None,
    layers: Sequence[int] | None = None,
    **settings: Any,
) -> Path:
    """An adapter of a model; ``ranks``: of modules of that name. ``settings`` replace or add to the configuration."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for name, module in linear_modules(model, targets).items():
        if layers is not None and int(name.split(".")[2]) not in layers:
            continue
        own = (ranks or {}).get(name.rpartition(".")[2], rank)
        a = torch.randn(own, module.in_features, generator=generator) / math.sqrt(module.in_features)
        b = torch.randn(module.out_features, own, generator=generator) * 0.1
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": list(targets),
        "rank_pattern": ranks or {},
        "alpha_pattern": {},
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": None,
        "modules_to_save": None,
        "loftq_config": {},
        "qalora_group_size": 16,
        **settings,
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@cache
def eight_bit_model() -> TinyModel:
    """The tiny Llama with weights of 8-bit integers times a scale for each row, which private modes keep as is."""
    model = tiny_model("llama")
    oracle, directory = copy.deepcopy(model.oracle), session_directory() / "eight-bit"
    for module in oracle.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    oracle.save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return TinyModel(oracle, directory)


def merged(model: TinyModel, directory: Path) -> TinyModel:
    """The model with W + s·B·A in the place of each W, by the formula and the file alone."""
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(directory / "adapter_model.safetensors")
    oracle = copy.deepcopy(model.oracle)
    modules = dict(oracle.named_modules())
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b, short = tensors[key.replace("lora_A", "lora_B")], name.rpartition(".")[2]
        alpha = config["alpha_pattern"].get(short, config["lora_alpha"])
        rank = config["rank_pattern"].get(short, config["r"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        modules[name].weight.data += scale * (b.float() @ a.float())
    return TinyModel(oracle, model.directory)
