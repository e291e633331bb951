"""From what a user types after ``--model`` to a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.json_object import read_json_object
from tsqp.config.dtype import DtypeName
from tsqp.errors import CheckpointNotFound, UnsupportedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SYNTHETIC = "synthetic:"
_KINDS = "a directory, a .gguf file, a Hub id (org/name), default, or synthetic:NAME"


def locate(model: str) -> str:
    """Make sure that ``model`` is on this machine, and name it by its path there; synthetic models keep their name.

    ``default`` and Hub ids may download; a path that exists comes before a Hub id of the same spelling.

    Raises CheckpointNotFound or FetchError, each with one line.
    """
    if model.startswith(SYNTHETIC):
        return model
    if model == "default":
        from tsqp.checkpoint.default import fetch_default

        return str(fetch_default())
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        from tsqp.checkpoint.hub import download_from_hub

        return str(download_from_hub(model))
    raise CheckpointNotFound(f"there is no model {model!r}; give {_KINDS}")


def locate_here(model: str) -> str:
    """As ``locate``, of what is on this machine already: nothing is downloaded. Raises CheckpointNotFound."""
    if model == "default":
        from tsqp.checkpoint.default import default_directory

        directory = default_directory()
        if directory is None:
            raise CheckpointNotFound("the default model is not here yet: tsqp model fetch")
        return str(directory)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf") and not Path(model).expanduser().exists():
        from tsqp.checkpoint.hub import cached_snapshot

        return str(cached_snapshot(model))
    return locate(model)


def stored_dtype(place: str) -> DtypeName:
    """What to compute a located model in when nobody says: float32 if its ``config.json`` does, else bfloat16.

    A model that was published in 16 bits, or quantised, gains nothing from more.
    """
    config = Path(place) / "config.json"
    if place.startswith(SYNTHETIC) or not config.is_file():
        return "bfloat16"
    settings = read_json_object(config)
    return "float32" if settings.get("dtype", settings.get("torch_dtype")) == "float32" else "bfloat16"


def open_checkpoint(model: str) -> Checkpoint:
    """Open the checkpoint that ``model`` names, on this machine or after ``locate`` has brought it here.

    Each format is imported when it is asked for, which keeps start-up short.

    Raises CheckpointNotFound, CorruptCheckpoint, UnsupportedModel or FetchError, each with one line.
    """
    place = locate(model)
    if place.startswith(SYNTHETIC):
        from tsqp.checkpoint.synthetic import SyntheticCheckpoint

        return SyntheticCheckpoint(place)
    return _open_path(Path(place))


def _open_path(path: Path) -> Checkpoint:
    if path.is_dir():
        from tsqp.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if path.suffix.lower() == ".gguf":
        from tsqp.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    raise UnsupportedModel(f"{path} is neither a directory nor a .gguf file; give {_KINDS}")
