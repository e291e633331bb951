"""``cuda:///path`` on the command line: labelled as no isolation, for open alone, and clear where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest

from tests.commands import Home, Result
from tests.families import tiny_model
from tests.wire.fake_cuda import FakeIpc
from tsqp.api.config import RunConfig, WorkerConfig
from tsqp.api.describe import mode_lines
from tsqp.api.plan import Plan
from tsqp.config.worker_options import parse_worker_options
from tsqp.errors import OptionError
from tsqp.wire.transport import listen

Command = Callable[..., Result]

RUN = ("generate", "hello", "-n", "1", "--model", str(tiny_model("llama").directory))
NO_LIBRARY = "libcuda-of-no-machine.so.1"


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.wire.transport.cuda.libcuda.LIBRARY", NO_LIBRARY)


@pytest.mark.parametrize("protection", ["masked", "verified"])
@pytest.mark.parametrize("workers", [("cuda:///x",), ("ipc:///x", "cuda:///x")])
def test_a_private_mode_refuses_it_in_one_line(tsqp: Command, protection: str, workers: tuple[str, ...]) -> None:
    named = [word for address in workers for word in ("--worker", address)]
    result = tsqp(*RUN, "--protection", protection, *named)
    assert result.code == 2
    assert "cuda:// gives no isolation" in result.error
    assert "--protection open" in result.error


def test_a_dealer_is_refused_in_one_line_whatever_else_is_said(tsqp: Command) -> None:
    for more in ((), ("--dealer-no-separation",)):
        result = tsqp(*RUN, "--pad-source", "dealer=cuda:///x", *more)
        assert result.code == 2
        assert "cuda:// gives no isolation: --pad-source may not have it" in result.error


def test_without_a_driver_a_run_says_what_is_missing_and_takes_nothing_else(tsqp: Command, home: Home) -> None:
    with closing(listen(f"cuda://{home.runtime}/x.sock", driver=FakeIpc())) as listener:
        result = tsqp(*RUN, "--protection", "open", "--worker", listener.address)
    assert result.code == 1
    assert f"no NVIDIA driver is here ({NO_LIBRARY} is not found)" in result.error
    assert "warning: no isolation: over cuda:// the worker can read and write" in result.err


def test_a_run_is_labelled_before_it_starts() -> None:
    def lines(address: str) -> list[str]:
        return [line for line, _ in mode_lines(Plan.of(RunConfig(protection="open", worker=WorkerConfig(address))))]

    assert any("no isolation" in line for line in lines("cuda:///x"))
    assert not any("no isolation" in line for line in lines("shm:///x"))


def test_help_and_doctor_label_it(tsqp: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no isolation" in " ".join(tsqp("generate", "--help").out.replace("│", " ").split())
    with pytest.raises(SystemExit):
        parse_worker_options(["--help"])
    assert "no isolation" in " ".join(capsys.readouterr().out.split())
    found = {finding["what"]: finding for finding in tsqp("doctor", "--json").json["findings"]}
    assert found["transport cuda"]["state"] == "note"
    assert found["transport cuda"]["detail"].startswith(
        "no isolation, so for --protection open alone; not here: no NVIDIA"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--listen cuda:// is for tensors on a GPU"),
        (("--device", "cpu"), "--listen cuda:// is for tensors on a GPU"),
        (("--device", "cuda", "--dtype", "field"), "no isolation"),
        (("--device", "cuda:0,cuda:1"), "tensors on one GPU"),
    ],
)
def test_a_worker_that_could_not_serve_it_refuses_to_listen(options: tuple[str, ...], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse_worker_options(["--listen", "cuda:///x", *options])


def test_a_worker_for_it_is_not_refused() -> None:
    for options in (("--device", "cuda"), ("--device", "1", "--dtype", "int8")):
        assert parse_worker_options(["--listen", "cuda:///x", *options]).listen == "cuda:///x"


def test_the_benchmark_of_the_line_says_that_it_needs_a_gpu(tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.bench.rpc.why_none", lambda _: "there is no CUDA device")
    result = tsqp("bench", "rpc", "--transport", "cuda", "--runs", "1")
    assert result.code == 2
    assert "--transport cuda needs a GPU: there is no CUDA device" in result.error
