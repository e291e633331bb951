"""Tokenizer, chat template and end tokens of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.json_object import read_json_object
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_text_format(directory: Path) -> TextFormat:
    """Raises UnsupportedModel without a ``tokenizer.json``, CorruptCheckpoint for a file that breaks its format."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModel(
            f"{directory} has no tokenizer.json; save a fast tokenizer there, for example with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    tokenizer = read_json_object(path)
    settings = _read_if_present(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(settings, _read_if_present(directory / "special_tokens_map.json"))
    eos_ids = _eos_ids(directory)
    eos_id = token_id(tokenizer, special_tokens.get("eos_token"))
    if eos_id is not None and eos_id not in eos_ids:
        eos_ids = (*eos_ids, eos_id)
    return TextFormat(
        tokenizer_json=path.read_text(encoding="utf-8"),
        eos_token_ids=eos_ids,
        chat_template=_chat_template(directory, settings),
        tool_chat_template=_chat_template(directory, settings, "tool_use"),
        special_tokens=special_tokens,
    )


def token_id(tokenizer: Mapping[str, Any], token: str | None) -> int | None:
    """The id of a token in a parsed ``tokenizer.json``: among the added tokens first, then in the vocabulary."""
    listed = tokenizer.get("added_tokens")
    for added in listed if isinstance(listed, list) else ():
        if isinstance(added, dict) and added.get("content") == token and isinstance(added.get("id"), int):
            return int(added["id"])
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = vocabulary.get(token) if isinstance(vocabulary, dict) else None  # a Unigram model's is a list
    return found if isinstance(found, int) else None


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens as strings; a file may hold each as a string or as an object with ``content``."""
    tokens: dict[str, str] = {}
    for key in SPECIAL_TOKENS:
        value = settings.get(key) or older.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def _eos_ids(directory: Path) -> tuple[int, ...]:
    """From ``generation_config.json``, which knows of several, or else from ``config.json``."""
    for name in ("generation_config.json", "config.json"):
        value = _read_if_present(directory / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CorruptCheckpoint(f"{directory / name}: eos_token_id must be an id or a list of ids, not {value!r}")
        return tuple(dict.fromkeys(ids))
    return ()


def _chat_template(directory: Path, settings: Mapping[str, Any], name: str = "default") -> str | None:
    """A file before the key ``chat_template``, which holds one template or several named ones."""
    default = directory / "chat_template.jinja"
    path = default if name == "default" else directory / "additional_chat_templates" / f"{name}.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    if default.is_file():
        return None
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == name]
        template = entries[-1].get("template") if entries else None
    elif name != "default":
        return None
    if template is not None and not isinstance(template, str):
        where = directory / "tokenizer_config.json"
        raise CorruptCheckpoint(f"{where}: chat_template must be a string, not {json.dumps(template)[:40]}")
    return template
