"""What goes wrong on this side while products are under way ends their session, and is nobody else's fault."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.api.mortal import MODEL, MortalRecorder, living
from tests.commands import LIMIT_S
from tests.families import random_tokens
from tests.trusted.guard import hostile
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import edited, serve
from tsqp import LLM, SamplingParams, WorkerConfig
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.errors import ChannelClosed, InputError
from tsqp.trusted.guard.sources import LocalPadSource

SHORT, LONG = random_tokens(3), random_tokens(40)
FEW = SamplingParams(max_tokens=3)


class TwoParts:
    """Micro-batches of every prompt of some length."""

    def parts(self, rows: int) -> int:
        return 2 if rows > 16 else 1

    def took(self, rows: int, parts: int, seconds: float) -> None:
        """Nothing is measured."""


@contextmanager
def opened(mode: ProtectionName, **guard: Any) -> Iterator[LLM]:
    with living(MortalRecorder()) as address:
        worker = WorkerConfig(address, deadline_s=LIMIT_S, patience_s=LIMIT_S)
        with LLM(MODEL, protection=mode, worker=worker, guard=GuardConfig(**guard)) as llm:
            yield llm


def tokens(llm: LLM, prompt: list[int]) -> tuple[int, ...]:
    return tuple(llm.generate(prompt, FEW)[0].token_ids)


def fails_once(real: Any, error: BaseException) -> Any:
    errors = [error]

    def call(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return real(*arguments)

    return call


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("mode", MODES)
def test_an_error_between_two_products_is_a_new_session_with_the_same_worker(
    mode: ProtectionName, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(mode) as llm:
        expected = tokens(llm, SHORT)
        decoder: Any = llm.engine.decoder
        decoder._micro_batches = TwoParts()
        kernels = decoder._layers.kernels
        session: Any = llm.session
        monkeypatch.setattr(type(kernels), "silu_mul", fails_once(type(kernels).silu_mul, error))
        with pytest.raises(type(error)):
            llm.generate(LONG, FEW)
        assert isinstance(session.ended, ChannelClosed)
        assert tokens(llm, SHORT) == expected
        assert llm.session is not session
        assert llm.worker_state is not None
        assert (llm.worker_state.state, llm.worker_state.failed_checks, llm.worker_state.expelled) == ("ready", 0, {})


@pytest.mark.parametrize("where", ["tsqp-pads", "MainThread"])
def test_pads_that_could_not_be_made_once_are_those_of_a_session_that_is_over(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = LocalPadSource.products, threading.Event()

    def products(*arguments: Any) -> Any:
        if threading.current_thread().name == where and not failed.is_set():
            failed.set()
            raise MemoryError
        return real(*arguments)

    with opened("verified") as llm:
        expected = tokens(llm, SHORT)
    monkeypatch.setattr(LocalPadSource, "products", products)
    with opened("masked", pads_ahead=64 if where == "tsqp-pads" else 0) as llm:
        if where == "tsqp-pads":
            assert failed.wait(LIMIT_S)
            assert llm.guard is not None
            assert llm.guard.filler is not None
            llm.guard.filler._thread.join(LIMIT_S)
        else:
            with pytest.raises(MemoryError):
                llm.generate(SHORT, FEW)
        assert tokens(llm, SHORT) == expected
        assert llm.worker_state is not None
        assert (llm.worker_state.state, llm.worker_state.expelled) == ("ready", {})


@pytest.mark.parametrize("transport", ["shm", "ipc"])
def test_a_product_that_no_line_carries_is_nobodys_fault(transport: str) -> None:
    with serve(MODEL, transport=transport) as (_, address):
        worker = WorkerConfig(address, deadline_s=LIMIT_S, patience_s=LIMIT_S)
        with LLM(MODEL, protection="verified", worker=worker) as llm:
            session: Any = llm.session
            session.channel._max_frame_bytes = 4 * llm.config.vocab_size * len(SHORT)
            with pytest.raises(InputError, match="the limit is"):
                llm.logits(LONG)
            assert len(tokens(llm, SHORT)) == 3
            assert llm.worker_state is not None
            assert llm.worker_state.expelled == {}


def test_logits_are_refused_in_a_forked_process() -> None:
    """Where check vectors are zeros, any product would be taken for right."""
    with (
        serve(MODEL, edited(hostile.zeros), 9, "shm") as (_, address),
        LLM(MODEL, protection="verified", worker=WorkerConfig(address, deadline_s=LIMIT_S, patience_s=0)) as llm,
    ):
        assert torch.isfinite(llm.logits(SHORT)).all()
        child = os.fork()
        if not child:
            try:
                llm.logits(SHORT)
            except InputError as error:
                os._exit(0 if "fork" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
