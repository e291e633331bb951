"""TSQP: split inference of Llama-family models on hardware you do not trust."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsqp.api.answer import Completion, Delta
    from tsqp.api.async_llm import AsyncAnswer, AsyncLLM
    from tsqp.api.config import ComputeConfig, GuardConfig, WorkerConfig
    from tsqp.api.llm import LLM
    from tsqp.errors import TsqpError
    from tsqp.trusted.engine.limits import Limits
    from tsqp.trusted.engine.sampling_params import SamplingParams
    from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncAnswer",
    "AsyncLLM",
    "Completion",
    "ComputeConfig",
    "Delta",
    "GuardConfig",
    "Limits",
    "SamplingParams",
    "StructuredOutputsParams",
    "TsqpError",
    "WorkerConfig",
    "__version__",
]

__version__ = version("tsqp")

# Resolved on first use, so that the worker never imports the trusted side and `--help` never imports torch.
_HOMES = {
    "LLM": "tsqp.api.llm",
    "AsyncAnswer": "tsqp.api.async_llm",
    "AsyncLLM": "tsqp.api.async_llm",
    "Completion": "tsqp.api.answer",
    "Delta": "tsqp.api.answer",
    "ComputeConfig": "tsqp.api.config",
    "GuardConfig": "tsqp.api.config",
    "WorkerConfig": "tsqp.api.config",
    "Limits": "tsqp.trusted.engine.limits",
    "SamplingParams": "tsqp.trusted.engine.sampling_params",
    "StructuredOutputsParams": "tsqp.trusted.engine.structured_outputs",
    "TsqpError": "tsqp.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
