"""What benchmarks can be told by name, and what they compute in."""

from __future__ import annotations

from typing import Literal

from tsqp.config.dtype import AskedDtype, PlainDtype

TransportName = Literal["mem", "ipc", "tcp", "shm", "cuda"]
# ours: linear in bfloat16, for what claims to be faster than that
PeerName = Literal["transformers", "llama.cpp", "ours", "none"]
PEER_PACKAGES: dict[PeerName, str] = {"transformers": "transformers", "llama.cpp": "xllamacpp"}


def benchmarked(dtype: AskedDtype) -> PlainDtype:
    """What a benchmark computes in: bfloat16, which the field compares, unless it is told otherwise."""
    return "bfloat16" if dtype == "auto" else dtype
