"""What a fresh interpreter loads: each side can ship without the other, and ``--help`` without torch."""

from __future__ import annotations

import pytest

from tests.fresh_interpreter import loaded, modules_after

WORKER = """
import tsqp.untrusted.__main__, tsqp.untrusted.worker, tsqp.untrusted.paths.plain, tsqp.untrusted.backends.device
import tsqp.wire.transport, tsqp.checkpoint
"""


# triton: only a worker on a GPU loads it, when it has a device.
@pytest.mark.parametrize("forbidden", ["tsqp.trusted", "tsqp.cli", "tokenizers", "jinja2", "transformers", "triton"])
def test_the_worker_never_loads_the_trusted_side(forbidden: str) -> None:
    assert not loaded(modules_after(WORKER), forbidden)


def test_the_trusted_side_never_loads_the_worker() -> None:
    modules = modules_after("import tsqp.api.llm, tsqp.cli.commands, tsqp.cli.doctor, tsqp.cli.report, tsqp.cli.chat")
    for forbidden in ("tsqp.untrusted", "tsqp.cluster", "ray", "transformers"):
        assert not loaded(modules, forbidden)


@pytest.mark.parametrize("forbidden", ["cyclopts", "rich", "tsqp.cli"])
def test_the_python_api_loads_no_library_of_the_command_line(forbidden: str) -> None:
    every = (
        "import pkgutil, tsqp.api; [__import__(f'tsqp.api.{m.name}') for m in pkgutil.iter_modules(tsqp.api.__path__)]"
    )
    assert not loaded(modules_after(f"from tsqp import LLM; {every}"), forbidden)


@pytest.mark.parametrize("forbidden", ["torch", "numpy", "transformers", "zmq"])
def test_help_loads_no_heavy_library(forbidden: str) -> None:
    assert not loaded(modules_after("from tsqp.cli.main import run; run(['--help'])"), forbidden)


@pytest.mark.parametrize("forbidden", ["torch", "numpy"])
def test_the_wire_moves_bytes_without_a_tensor_library(forbidden: str) -> None:
    statement = (
        "import tsqp.wire.transport, tsqp.wire.codec; import tsqp.wire.transport.zmq, tsqp.wire.transport.memory"
    )
    assert not loaded(modules_after(statement), forbidden)


def test_public_names_are_exactly_these() -> None:
    import tsqp

    configs = {"ComputeConfig", "GuardConfig", "WorkerConfig"}
    params = {"SamplingParams", "StructuredOutputsParams"}
    answers = {"AsyncAnswer", "AsyncLLM", "Completion", "Delta", "LLM", "Limits", *params}
    assert set(tsqp.__all__) == {*answers, "TsqpError", "__version__", *configs}
    assert all(hasattr(tsqp, name) for name in tsqp.__all__)
    with pytest.raises(AttributeError):
        tsqp.nothing  # noqa: B018


def test_each_option_is_described_where_python_users_look() -> None:
    import tsqp

    described = " ".join(str(config.__doc__) for config in (tsqp.WorkerConfig, tsqp.GuardConfig, tsqp.ComputeConfig))
    assert all(f"``{name}``: " in described for name in ("address", "arena_bytes", "pad_memory", "wire_dtype"))
