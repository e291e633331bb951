"""A LoRA adapter in a directory as PEFT saves it: two small matrices for each weight that it changes.

Names of modules are those of the model's Hugging Face checkpoint, whatever file the model itself is read from. Covers:
what is malformed, hostile or of another model ends in one error (tests/checkpoint/test_adapter.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tsqp.checkpoint.adapter_config import ends_with, parse_adapter_config, shown
from tsqp.checkpoint.hf_tensors import Stored, stored_shapes, stored_tensors
from tsqp.checkpoint.json_object import read_json_object
from tsqp.config.groups import LAYER_GROUPS, linear_groups, part_tensor
from tsqp.config.model import ModelConfig
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.([\w.]{1,200})\.lora_([AB])\.weight", re.ASCII)
_LAYER = re.compile(r"\.(\d{1,6})\.", re.ASCII)
_DTYPES = ("F32", "F16", "BF16")
_DORA = "lora_magnitude_vector"


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight (out, in): b·a, a float32 (r, in), b float32 (out, r) with the scale in it."""

    a: torch.Tensor
    b: torch.Tensor


LayerPart = tuple[int, str]  # a layer, and a part of a linear group as ``LinearGroup.parts`` names it


class Adapter:
    """All of an adapter, read and checked as far as that can be done without its model.

    ``digest``: SHA-256, 64 hex digits, over the name, scale, types, shapes and bytes of its matrices.

    Raises CheckpointNotFound, CorruptCheckpoint and UnsupportedModel.
    """

    def __init__(self, directory: Path) -> None:
        self._where = str(directory)
        self.config = parse_adapter_config(_settings(directory), str(directory / CONFIG_FILE))
        self._pairs = _paired(_stored(directory), self._where)
        self._check_configuration()
        self.digest = self._digest()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module that it changes, by the module's name."""
        return {module: len(a) for module, (a, _) in self._pairs.items()}

    @property
    def layers(self) -> list[int]:
        """The layers that have any of them."""
        return sorted({int(found[1]) for module in self._pairs if (found := _LAYER.search(module))})

    @property
    def parameters(self) -> int:
        """Numbers in its matrices."""
        return sum(a.numel() + b.numel() for a, b in self._pairs.values())

    def parts(self, model: ModelConfig) -> dict[LayerPart, LowRank]:
        """What is added to each matrix of a model, its rows in the order of the model's.

        Raises CorruptCheckpoint for an adapter that does not fit, UnsupportedModel for modules that it cannot change.
        """
        places, modules = _linear_places(model), stored_shapes(model, stored_tensors(model))
        shapes = {place.name: modules[place.name] for place in places.values()}
        self._check_modules({name.removesuffix(".weight") for name in shapes})
        found: dict[LayerPart, LowRank] = {}
        for part, place in places.items():
            module = place.name.removesuffix(".weight")
            if module in self._pairs:
                a, b = self._pairs[module]
                self._check_shapes(module, a, b, shapes[place.name])
                scaled = b.float() * self.config.scale_of(module)
                if not scaled.isfinite().all():
                    raise CorruptCheckpoint(f"{self._where}: {module} has numbers that are too large once scaled")
                found[part] = LowRank(a.float().contiguous(), place.taken_from(scaled).contiguous())
        return found

    def _check_configuration(self) -> None:
        """What is stored against what the configuration says."""
        for module, (a, _) in self._pairs.items():
            rank = self.config.rank_of(module)
            if len(a) != rank:
                raise CorruptCheckpoint(
                    f"{self._where}: {module} is stored with rank {len(a)}, its configuration says {rank}"
                )
            if not self._asked_for(module):
                raise CorruptCheckpoint(f"{self._where}: {module} is stored, and its configuration does not name it")

    def _asked_for(self, module: str) -> bool:
        targets, layers = self.config.targets, self.config.layers
        if targets is not None and not any(ends_with(module, end) for end in targets):
            return False
        if any(ends_with(module, end) for end in self.config.excluded or ()):
            return False
        layer = _LAYER.search(module)
        return layers is None or (layer is not None and int(layer[1]) in layers)

    def _check_modules(self, modules: set[str]) -> None:
        """Names against those of a model, and every target that the configuration lists against what is stored."""
        for module in self._pairs:
            if module not in modules:
                raise UnsupportedModel(
                    f"{self._where}: {module} is none of the linear layers of this model, which adapters can change"
                )
        for end in self.config.targets or ():
            if not any(ends_with(module, end) for module in modules):
                raise UnsupportedModel(
                    f"{self._where}: the target {shown(end)} is none of the linear layers of this model, "
                    "which adapters can change"
                )
        if None not in (self.config.targets, self.config.excluded):
            missing = sorted(module for module in modules if self._asked_for(module) and module not in self._pairs)
            if missing:
                raise CorruptCheckpoint(f"{self._where}: the tensors of {missing[0]} are missing")

    def _check_shapes(self, module: str, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...]) -> None:
        """A and B of a module against its weight, (out, in)."""
        if (len(b), a.shape[1]) != shape:
            raise CorruptCheckpoint(
                f"{self._where}: {module} is for a weight of {(len(b), a.shape[1])}, and this model has one of {shape}"
            )

    def _digest(self) -> str:
        import torch

        digest = hashlib.sha256()
        for module in sorted(self._pairs):
            digest.update(json.dumps([module, self.config.scale_of(module)]).encode())
            for tensor in self._pairs[module]:
                digest.update(f"\n{tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def is_adapter(path: Path) -> bool:
    """Whether a directory looks like one of an adapter, and not of a model."""
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").exists()


def _settings(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointNotFound(f"{directory} has no {CONFIG_FILE}: it is not a directory of a LoRA adapter")
    return read_json_object(directory / CONFIG_FILE)


def _stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file, by its name there."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        if (directory / PICKLE_FILE).exists():
            raise UnsupportedModel(
                f"{directory / PICKLE_FILE} is a pickle, which runs code when read: save the adapter as safetensors"
            )
        raise CheckpointNotFound(f"{directory} has no {WEIGHTS_FILE}")
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a native class, which is no mapping)
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise UnsupportedModel(
                        f"{path}: {shown(name)} is stored as {dtype}; supported are float32, float16 and bfloat16"
                    )
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} is truncated or damaged: {shown(str(error))}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror or 'it is no file of tensors'}") from error
    return tensors


def _paired(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (r, in) and B (out, r) of each module, copied out of the file."""
    import torch

    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            kind = "DoRA" if _DORA in name else "this kind"
            raise UnsupportedModel(f"{where}: the tensor {shown(name)} is none of a LoRA: {kind} is not implemented")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise CorruptCheckpoint(f"{where}: {WEIGHTS_FILE} has no tensors")
    pairs = {}
    for module, both in found.items():
        a, b = both.get("A"), both.get("B")
        if a is None or b is None:
            raise CorruptCheckpoint(f"{where}: {module} has one of its two matrices only")
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise CorruptCheckpoint(f"{where}: {module} has matrices of {shapes}, which are no (r, in) and (out, r)")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CorruptCheckpoint(f"{where}: {module} has numbers that are none")
        pairs[module] = a.clone(), b.clone()
    return pairs


def _linear_places(model: ModelConfig) -> dict[LayerPart, Stored]:
    """Where the matrix of each part of each layer is in a file of the model."""
    places = stored_tensors(model)
    return {(layer, part): places[part_tensor(layer, part, "weight")] for layer, part in _parts(model)}


def _parts(model: ModelConfig) -> Iterator[LayerPart]:
    groups = linear_groups(model)
    for layer in range(model.num_layers):
        for name in LAYER_GROUPS:
            for part, _ in groups[name].parts:
                yield layer, part
