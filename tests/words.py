"""A tiny model whose tokens are words, each with the space before it: only the first of a text goes without."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.families import VOCAB, tiny_model

TEMPLATE = "{{ messages[0].content }}"


def words_model(directory: Path, chat_template: str | None = None) -> Path:
    """Its directory below this one. Its words are ``w0``, ``w1``, ..."""
    made = directory / "words"
    copytree(tiny_model("llama").directory, made)
    tokenizer = Tokenizer(models.WordLevel({f"▁w{at}": at for at in range(VOCAB)}, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.save(str(made / "tokenizer.json"))
    if chat_template is not None:
        settings = json.dumps({"chat_template": chat_template})
        (made / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return made
