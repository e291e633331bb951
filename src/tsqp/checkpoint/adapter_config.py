"""``adapter_config.json`` of a LoRA adapter, as PEFT writes it: what is understood, and what is refused by name.

Covers: no regular expression of the file is evaluated (tests/checkpoint/test_adapter.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tsqp.errors import CorruptCheckpoint, UnsupportedModel

N = TypeVar("N", int, float)

MAX_RANK = 1 << 16
# What a configuration may say without changing what is computed, beside what is parsed here. Anything else must be off.
_NO_PART = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
        *("lora_dropout", "megatron_core", "qalora_group_size"),
    )
)
_PARSED = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"),
    )
)
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")  # ``init_lora_weights`` that leave the weights beside them alone
_MODULE_NAME = re.compile(r"[\w.]+", re.ASCII)
_MODULE_KEY = re.compile(r"\^?((?:[\w.]|\\\.)+)\$?", re.ASCII)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's configuration says.

    ``targets``: ends of names of modules; None for a regular expression, which is not evaluated. ``excluded``: the
    same of modules that are left out. ``ranks`` and ``alphas`` are those of modules whose names end so; for others
    ``rank`` and ``alpha``. ``layers``: None for all. ``base``: the model that it says it is for.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    layers: frozenset[int] | None
    base: str | None

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the model."""
        return _of_module(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What multiplies its product."""
        alpha, rank = _of_module(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def parse_adapter_config(settings: Mapping[str, Any], where: str) -> AdapterConfig:
    """Raises UnsupportedModel for what is not computed here, CorruptCheckpoint for what cannot be."""
    _refuse_others(settings, where)
    base = settings.get("base_model_name_or_path")
    return AdapterConfig(
        rank=_rank(settings.get("r"), f"{where}: r"),
        alpha=_number(settings.get("lora_alpha"), f"{where}: lora_alpha"),
        rslora=_flag(settings, "use_rslora", where),
        targets=_targets(settings.get("target_modules"), where),
        excluded=_excluded(settings.get("exclude_modules"), where),
        ranks={end: _rank(value, at) for end, value, at in _patterns(settings, "rank_pattern", where)},
        alphas={end: _number(value, at) for end, value, at in _patterns(settings, "alpha_pattern", where)},
        layers=_layers(settings, where),
        base=base if isinstance(base, str) and base.isprintable() else None,
    )


def ends_with(module: str, end: str) -> bool:
    """Whether the name of a module is ``end``, or ends with it after a dot."""
    return module == end or module.endswith(f".{end}")


def shown(text: object) -> str:
    """What a file says, in one short line."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


def _refuse_others(settings: Mapping[str, Any], where: str) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel(f"{where}: peft_type {shown(kind)} is not implemented; LORA is")
    if settings.get("bias", "none") != "none":
        raise UnsupportedModel(f"{where}: bias {shown(settings['bias'])} is not implemented; none is")
    start = settings.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in _HARMLESS_STARTS):
        raise UnsupportedModel(
            f"{where}: init_lora_weights {shown(start)} has changed the model's weights too: have PEFT convert the "
            "adapter when it saves it, by path_initial_model_for_weight_conversion"
        )
    for name, value in settings.items():
        if value and name not in _NO_PART | _PARSED:  # settings that are new to this code are off where they are empty
            raise UnsupportedModel(f"{where}: {shown(name)} is set, and adapters with it are not implemented")


def _rank(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise CorruptCheckpoint(f"{where} must be a whole number of 1 to {MAX_RANK}, not {shown(value)}")
    return value


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise CorruptCheckpoint(f"{where} must be a number, not {shown(value)}")
    return float(value)


def _flag(settings: Mapping[str, Any], name: str, where: str) -> bool:
    value = settings.get(name)
    if not (value is None or isinstance(value, bool)):
        raise CorruptCheckpoint(f"{where}: {name} must be true or false, not {shown(value)}")
    return bool(value)


def _targets(value: object, where: str) -> tuple[str, ...] | None:
    if isinstance(value, str) and value:
        return None
    names = value if isinstance(value, list) else []
    if not names or not all(isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in names):
        raise CorruptCheckpoint(f"{where}: target_modules must be names of modules or a regular expression")
    return tuple(names)


def _excluded(value: object, where: str) -> tuple[str, ...] | None:
    if isinstance(value, str) and value:
        return None
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptCheckpoint(f"{where}: exclude_modules must be names of modules or a regular expression")
    return tuple(names)


def _patterns(settings: Mapping[str, Any], name: str, where: str) -> list[tuple[str, object, str]]:
    """Ends of names, values, and where each is. PEFT takes the keys as regular expressions."""
    patterns = settings.get(name)
    if not (patterns is None or isinstance(patterns, dict)):
        raise CorruptCheckpoint(f"{where}: {name} must be an object, not {shown(patterns)}")
    found = []
    for key, value in (patterns or {}).items():
        match = _MODULE_KEY.fullmatch(key)
        if match is None:
            raise UnsupportedModel(
                f"{where}: the key {shown(key)} of {name} is a regular expression, and names alone are implemented"
            )
        found.append((match[1].replace("\\.", "."), value, f"{where}: {name} of {shown(key)}"))
    return found


def _layers(settings: Mapping[str, Any], where: str) -> frozenset[int] | None:
    if settings.get("layers_pattern") not in (None, [], "layers", ["layers"], ""):
        raise UnsupportedModel(f"{where}: layers_pattern is not implemented, but for 'layers'")
    value = settings.get("layers_to_transform")
    numbers = value if isinstance(value, list) else [value]
    if value is None or not numbers:
        return None
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise CorruptCheckpoint(f"{where}: layers_to_transform must be numbers of layers")
    return frozenset(numbers)


def _of_module(values: Mapping[str, N], module: str, default: N) -> N:
    """The first one in the order of the file, as PEFT has it."""
    return next((value for end, value in values.items() if ends_with(module, end)), default)
