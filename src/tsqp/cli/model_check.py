"""``tsqp model check``: what would run and how, and what it takes, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from tsqp.api.config import GuardConfig, RunConfig
from tsqp.api.memory_limits import available_bytes
from tsqp.api.memory_plan import KV_TOKENS, memory_plan
from tsqp.api.plan import Plan
from tsqp.arith.field import MAX_FIELD_TERMS
from tsqp.checkpoint import open_checkpoint, stored_dtype
from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.contents import files_text
from tsqp.checkpoint.open import locate_here
from tsqp.cli.models import parameters
from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.config.protection import PROTECTIONS, ProtectionName
from tsqp.errors import CheckpointError, PromptError, TsqpError
from tsqp.trusted.text.tokenizer import Tokenizer

# What a run may be: its name here, its protection, and whether a dealer multiplies pads.
_MODES: dict[str, tuple[ProtectionName, bool]] = {
    "masked": ("masked", False),
    "masked, with a dealer": ("masked", True),
    "verified": ("verified", False),
    "open": ("open", False),
    "local": ("local", False),
}
_DEALER = "dealer=shm:///dealer"  # never called


def check_model(model: str) -> dict[str, Any]:
    """What a run of this model would be. Nothing is downloaded, no weight is read.

    ``runs``: whether any mode does. ``refused``: why not, a line for each reason that was found.
    """
    found: dict[str, Any] = {"model": model, "runs": False, "refused": []}
    try:
        place = locate_here(model)
        checkpoint = open_checkpoint(place)
    except CheckpointError as error:
        return found | {"refused": [str(error)]}
    config = checkpoint.config
    text, refused = _tried(lambda: _text(checkpoint))
    modes = {name: _mode(checkpoint, place, *mode) for name, mode in _MODES.items()}
    return found | {
        "runs": not refused and any(mode["runs"] for mode in modes.values()),
        "refused": refused,
        "place": place,
        "files": files_text(checkpoint),
        "stored_as": dict(checkpoint.stored_as()),
        "not_used": list(checkpoint.not_used()),
        **_shape(config),
        **(text or {}),
        "compiled_step": config.plain_block,
        "modes": modes,
        "available_bytes": available_bytes(),
    }


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "architecture": config.architecture,
        "parameters": parameters(config),
        "layers": config.num_layers,
        "context": config.max_positions,
        "rope": config.rope.kind,
        "sliding_window": next((window for window in config.windows if window is not None), None),
    }


def _text(checkpoint: Checkpoint) -> dict[str, Any]:
    """How text becomes tokens. Raises CheckpointError for a tokenizer that is not read."""
    text = checkpoint.text_format()
    tokenizer = Tokenizer(text)
    return {
        "tokenizer": json.loads(text.tokenizer_json)["model"].get("type", "BPE"),
        "chat_template": _template(tokenizer, text),
        "ends": list(text.eos_token_ids),
    }


def _template(tokenizer: Tokenizer, text: TextFormat) -> str:
    if text.chat_template is None:
        return "none: a prompt is taken as it is, and there is no chat"
    try:
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    except PromptError as error:
        return f"refused: {error}"
    return "yes, and one for tools" if text.tool_chat_template else "yes"


def _mode(checkpoint: Checkpoint, place: str, protection: ProtectionName, dealer: bool) -> dict[str, Any]:
    guard = GuardConfig(pad_source=_DEALER, dealer_no_separation=True) if dealer else GuardConfig()
    plan = Plan.of(RunConfig(place, protection, guard=guard), stored_dtype(place))
    refused = _private_refusal(checkpoint.config) if PROTECTIONS[protection].checked else None
    return {
        "runs": refused is None,
        "refused": refused,
        "dtype": plan.linear_dtype,
        "kv_dtype": plan.kv_dtype,
        **{f"{name}_bytes": size for name, size in asdict(memory_plan(checkpoint, plan)).items()},
    }


def _private_refusal(config: ModelConfig) -> str | None:
    for name, group in linear_groups(config).items():
        if group.in_features > MAX_FIELD_TERMS:
            return f"group {name} has {group.in_features} inputs, 8-bit products at most {MAX_FIELD_TERMS}"
    return None


def _tried(read: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        return read(), []
    except TsqpError as error:
        return None, [str(error)]


def check_lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for a person."""
    for key, value in found.items():
        if key in ("modes", "refused", "runs") or value in ({}, []):
            continue
        if key == "available_bytes":
            value = "unknown" if value is None else f"{value / 1e9:.1f} GB"
        elif isinstance(value, dict):
            value = ", ".join(f"{count} {name}" for name, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif value is None or isinstance(value, bool):
            value = "yes" if value else "no"
        yield f"{key.removesuffix('_bytes').replace('_', ' '):20} {value}"
    if "modes" in found:
        yield ""
        titles = ("GB of weights: worker", "this side", f"keys, values of {KV_TOKENS:,} tokens", "pads")
        yield f"{'mode':24}" + "".join(f"{title:>{_width(title)}}" for title in titles)
        for name, mode in found["modes"].items():
            sizes = [mode[f"{part}_bytes"] / 1e9 for part in ("worker", "trusted", "kv", "pads")]
            cells = (f"{size:{_width(title)}.2f}" for size, title in zip(sizes, titles, strict=True))
            yield f"{name:24}" + (f"refused: {mode['refused']}" if mode["refused"] else "".join(cells))
    yield ""
    yield "it runs" if found["runs"] else "refused: " + "; ".join(found["refused"] or ["no mode takes it"])


def _width(title: str) -> int:
    return len(title) + 3
