"""The fingerprint of a checkpoint: a digest over its shape and over samples of its weights.

Sampling keeps it at milliseconds for any size. It finds a wrong checkpoint taken by mistake; somebody who forges one
can leave the sampled bytes as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tsqp.config.model import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the file stores it: ``data`` are its bytes, one-dimensional uint8 and possibly memory-mapped."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


def config_json(config: ModelConfig) -> bytes:
    """The canonical JSON of a config."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":")).encode()


def fingerprint(config: ModelConfig, tensors: Iterable[RawTensor]) -> str:
    """SHA-256 as 64 hex digits over the config and, by name, over each tensor's dtype, shape and samples.

    The samples are 4 KiB from the beginning, the middle and the end. How tensors are spread over files plays no part.
    """
    digest = hashlib.sha256(config_json(config))
    for tensor in sorted(tensors, key=lambda t: t.name):
        digest.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        size = len(tensor.data)
        middle = max(0, (size - SAMPLE_BYTES) // 2)
        for start in (0, middle, max(0, size - SAMPLE_BYTES)):
            digest.update(tensor.data[start : start + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()
