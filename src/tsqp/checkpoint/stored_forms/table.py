"""Which forms there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tsqp.checkpoint.json_object import read_json_object
from tsqp.checkpoint.stored_forms.awq import Awq
from tsqp.checkpoint.stored_forms.base import StoredForm
from tsqp.checkpoint.stored_forms.bitsandbytes import BitsAndBytes
from tsqp.checkpoint.stored_forms.compressed_tensors import CompressedTensors
from tsqp.checkpoint.stored_forms.fp8 import Fp8
from tsqp.checkpoint.stored_forms.gptq import Gptq
from tsqp.errors import CorruptCheckpoint, UnsupportedModel


class _Parser(Protocol):
    def __call__(self, quantisation: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> StoredForm: ...


FORMS: dict[str, _Parser] = {
    "awq": Awq.of,
    "bitsandbytes": BitsAndBytes.of,
    "compressed-tensors": CompressedTensors.of,
    "fbgemm_fp8": Fp8.of,
    "fp8": Fp8.of,
    "gptq": Gptq.of,
}


LEGACY_FILE = "quantize_config.json"  # of older GPTQ tools, whose config.json does not say that a model is quantised


def form_in(directory: Path, settings: Mapping[str, Any]) -> StoredForm | None:
    """The form that a directory names in its ``config.json``, which ``settings`` are; else in ``LEGACY_FILE``.

    Where both say something, ``config.json`` counts. Raises as ``stored_form``.
    """
    legacy = directory / LEGACY_FILE
    if not _named(settings) and legacy.is_file():
        found = read_json_object(legacy)
        found["quant_method"] = found.get("quant_method") or "gptq"  # the first of these tools knew no other
        return stored_form({**settings, "quantization_config": found}, str(legacy))
    return stored_form(settings, str(directory / "config.json"))


def stored_form(settings: Mapping[str, Any], where: str) -> StoredForm | None:
    """The form that a ``config.json`` names in ``quantization_config``; None if it names none.

    Raises UnsupportedModel for one that is not read, by name, and CorruptCheckpoint.
    """
    quantisation = _named(settings)
    if not quantisation:
        return None
    if not isinstance(quantisation, dict):
        raise CorruptCheckpoint(f"{where}: quantization_config must be an object")
    method = quantisation.get("quant_method")
    if method is None and (quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")):
        method = "bitsandbytes"  # whose older configurations do not name it
    if not isinstance(method, str) or method not in FORMS:
        raise UnsupportedModel(
            f"{where}: the quant_method {method!r} is not implemented; supported are {', '.join(FORMS)}"
        )
    return FORMS[method](quantisation, settings, where)


def _named(settings: Mapping[str, Any]) -> Any:
    return settings.get("quantization_config") or settings.get("compression_config")
