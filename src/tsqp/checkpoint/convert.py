"""A GGUF file to a Hugging Face directory that this package and transformers read alike."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.gguf import GgufCheckpoint
from tsqp.checkpoint.hf_config import hf_config_of
from tsqp.checkpoint.hf_text import token_id
from tsqp.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 << 30  # what the conversion holds in memory at a time
_TEMPORARY = ".converting-"


def convert_gguf(gguf: Path, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``directory`` from ``gguf``; it must not exist yet.

    Float tensors keep their dtype, quantised ones become the float32 that they stand for, so nothing is lost. All is
    written beside ``directory`` first and renamed at the end: a directory of that name is a whole one.

    Raises CheckpointError when the target exists, UnsupportedModel for a family that is not written, OSError when the
    disk is full, and what opening the file raises.
    """
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; name a new directory")
    checkpoint = GgufCheckpoint(gguf)
    hf_config_of(checkpoint.config, "float32")  # before any weight is read: not every family can be written
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory.parent))
    try:
        dtypes = _write_weights(checkpoint, temporary, shard_bytes)
        # Norms are float32 in every GGUF: the matrices say what the model is.
        _write_settings(checkpoint, temporary, dtype=dtypes["model.embed_tokens.weight"])
        temporary.chmod(0o755)
        temporary.replace(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_unfinished(parent: Path) -> None:
    """Delete what conversions killed half-way left in ``parent``. The caller makes sure that none is running."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_weights(checkpoint: GgufCheckpoint, directory: Path, shard_bytes: int) -> dict[str, str]:
    """One file, or shards and their index. Returns each tensor's dtype."""
    shard: dict[str, torch.Tensor] = {}
    dtypes: dict[str, str] = {}
    parts: list[list[str]] = []
    held = total = 0
    names = list(tensor_shapes(checkpoint.config))
    for name in names:
        tensor = checkpoint.tensor(name).contiguous()
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            _write_part(shard, directory, parts)
            shard, held = {}, 0
        shard[name] = tensor
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        held += size
        total += size
    _write_part(shard, directory, parts)
    if len(parts) == 1:
        _part_path(directory, 1).rename(directory / SINGLE_FILE)
        return dtypes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _part_path(directory, number).rename(directory / final)
        weight_map |= dict.fromkeys(part, final)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dtypes


def _write_part(shard: dict[str, torch.Tensor], directory: Path, parts: list[list[str]]) -> None:
    """Write one shard; how many there will be, and so its final name, is not known yet."""
    parts.append(list(shard))
    path = _part_path(directory, len(parts))
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:
        cause = re.search(r"\(os error (\d+)\)", str(error))  # a full disk, told in its text only
        if cause is not None:
            raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error
        raise CheckpointError(f"writing {path} failed: {error}") from error
    path.chmod(0o644)  # the library's 0600 would hide public weights from a worker under another user


def _part_path(directory: Path, number: int) -> Path:
    return directory / f"part-{number}.safetensors"


def _write_settings(checkpoint: GgufCheckpoint, directory: Path, dtype: str) -> None:
    text = checkpoint.text_format()
    written = hf_config_of(checkpoint.config, dtype) | _special_ids(text)
    _write_json(directory / "config.json", written)
    _write_json(directory / "generation_config.json", _special_ids(text))
    (directory / "tokenizer.json").write_text(text.tokenizer_json, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config.max_positions,
        **text.special_tokens,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    if text.chat_template is not None:
        (directory / "chat_template.jinja").write_text(text.chat_template, encoding="utf-8")
    if text.tool_chat_template is not None:
        (directory / "additional_chat_templates").mkdir(exist_ok=True)
        path = directory / "additional_chat_templates" / "tool_use.jinja"
        path.write_text(text.tool_chat_template, encoding="utf-8")


def _special_ids(text: TextFormat) -> dict[str, Any]:
    """The ids that transformers' configurations hold; null where the file names none, lest a default steps in."""
    tokenizer = json.loads(text.tokenizer_json)
    ids = text.eos_token_ids
    return {
        "bos_token_id": token_id(tokenizer, text.special_tokens.get("bos_token")),
        "eos_token_id": ids[0] if len(ids) == 1 else list(ids) or None,
        "pad_token_id": token_id(tokenizer, text.special_tokens.get("pad_token")),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
