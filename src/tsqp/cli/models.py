"""What ``tsqp model`` lists, fetches and describes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsqp.api.adapters import load_adapters
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.adapter import Adapter, is_adapter
from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.default import default_directory, fetch_default
from tsqp.checkpoint.hub import download_from_hub
from tsqp.checkpoint.shapes import norm_names, tensor_shapes
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.config.partition import PARTITIONS
from tsqp.errors import OptionError
from tsqp.progress import Progress, unseen


def known_models() -> list[dict[str, str]]:
    """The names that ``--model`` takes without a file, with the state of each."""
    directory = default_directory()
    state = "not fetched yet" if directory is None else f"ready in {directory}"
    synthetic = [{"model": f"synthetic:{name}", "state": "random weights, made when used"} for name in SHAPES]
    return [{"model": "default", "state": f"SmolLM2-135M-Instruct, {state}"}, *synthetic]


def fetch_model(model: str, from_file: Path | None) -> Path:
    """Download a model and return its directory. Raises FetchError, OptionError."""
    if model == "default":
        return fetch_default(from_file)
    if from_file is not None:
        raise OptionError("--from goes with the default model only")
    if "/" not in model or Path(model).exists():
        raise OptionError(f"there is nothing to fetch for '{model}': give default or a Hub id such as org/name")
    return download_from_hub(model)


def describe(
    model: str, *, digest: bool = False, lora: tuple[str, ...] = (), progress: Progress = unseen
) -> dict[str, Any]:
    """A checkpoint's shape, fingerprint and calls per forward pass; ``digest``: what ``--model-digest`` pins, too.

    ``lora``: the adapters of the run whose digest it is. Of an adapter: what is known of it. Raises CheckpointError,
    OptionError.
    """
    if lora and not digest:
        raise OptionError("--lora is for --digest: the digest of a run covers its adapters")
    if is_adapter(Path(model).expanduser()):
        return describe_adapter(Path(model).expanduser(), digest=digest)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    return {
        "model": model,
        "architecture": config.architecture,
        "parameters": parameters(config),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_positions,
        "rope": config.rope.kind,
        "sliding_window": next((window for window in config.windows if window is not None), None),
        "tied_embeddings": config.tied_embeddings,
        **({"left_out": ", ".join(checkpoint.left_out)} if checkpoint.left_out else {}),
        "stored_as": dict(checkpoint.stored_as()),
        "not_used": list(checkpoint.not_used()),
        "fingerprint": checkpoint.fingerprint(),
        **({"model_digest": _digest(checkpoint, lora, progress)} if digest else {}),
        "calls_per_pass": {name: partition.calls_per_pass(config.num_layers) for name, partition in PARTITIONS.items()},
    }


def in_words(value: object) -> str:
    """A value of a description, for a person."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def describe_adapter(directory: Path, *, digest: bool) -> dict[str, Any]:
    """What a LoRA adapter is, whatever model it is for. Raises CheckpointError, OptionError."""
    if digest:
        raise OptionError("an adapter has one digest, which is shown: --digest is for models")
    adapter = Adapter(directory)
    ranks, config = adapter.ranks, adapter.config
    return {
        "adapter": str(directory),
        "base_model": config.base,
        "ranks": sorted(set(ranks.values())),
        "scales": sorted({config.scale_of(module) for module in ranks}),
        "targets": sorted({module.rpartition(".")[2] for module in ranks}),
        "layers": adapter.layers,
        "parameters": adapter.parameters,
        "sha256": adapter.digest,
    }


def _digest(checkpoint: Checkpoint, lora: tuple[str, ...], progress: Progress) -> str:
    """The digest of what a private mode loads, for which every weight is read and quantised."""
    adapters = load_adapters(lora, checkpoint.config)
    progress("loading libraries")
    import torch

    from tsqp.model.decoder_layers import Norms
    from tsqp.trusted.private import load_private_model

    table, norms = checkpoint.tensor("model.embed_tokens.weight"), Norms.load(checkpoint, torch.float32)
    loaded = load_private_model(checkpoint, table, norms, checks=1, keep_weights=False, progress=progress)
    return adapters.run_digest(loaded.digest)


def parameters(config: ModelConfig) -> int:
    """The number of weights, norms included, a tied embedding once."""
    groups = linear_groups(config)
    weights = {name: group.out_features * (group.in_features + group.bias) for name, group in groups.items()}
    head = weights.pop("lm_head")
    shapes = tensor_shapes(replace(config, num_layers=1))
    norms = sum(math.prod(shapes[name]) for name in norm_names(config, 0).values())
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
    return config.num_layers * (sum(weights.values()) + norms) + config.hidden_size + head + embedding
