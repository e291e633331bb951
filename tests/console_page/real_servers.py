"""Real servers with a console and a tiny model, whose worker is honest, lies, or is gone for a while."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx

from tests.api.mortal import MortalRecorder
from tests.commands import LIMIT_S
from tests.conftest import fresh_address
from tests.server.chat_model import chat_model
from tests.server.serving import NAME, served, service_of
from tests.trusted.guard import hostile
from tests.trusted.guard.hostile import edited
from tests.trusted.step_runs import RecordingWorker
from tsqp import LLM, AsyncLLM
from tsqp.api.config import ProtectionName
from tsqp.server.console.console import open_console
from tsqp.wire.transport import listen


@contextmanager
def console(protection: ProtectionName, worker: str | None = None) -> Iterator[str]:
    """The address of a server with a console. Without ``worker`` one of its own is started."""
    llm = LLM(str(chat_model()), protection=protection, worker=worker, taps=True)
    model = AsyncLLM(llm)
    try:
        service = service_of(model, protection=protection, console=open_console(llm))
        with served(service) as url:
            yield url + "/"
    finally:
        asyncio.run(model.close(0))


def api_text(url: str, question: str, **fields: Any) -> str:
    """What the chat API answers."""
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], **fields}
    answer = httpx.post(f"{url}v1/chat/completions", json=body, timeout=LIMIT_S)
    return answer.raise_for_status().json()["choices"][0]["message"]["content"]


class Cheat(MortalRecorder):
    """Flips a bit of product number ``at``."""

    def __init__(self, at: int) -> None:
        RecordingWorker.__init__(self, str(chat_model()), edited(hostile.flip_low_bit), at)
        self.deaths, self.asked = [], 0


def mortal(dies_at: int) -> MortalRecorder:
    """Honest, but gone with call number ``dies_at``."""
    return MortalRecorder([dies_at], str(chat_model()))


@contextmanager
def coming_back(worker: MortalRecorder) -> Iterator[tuple[str, threading.Event]]:
    """The address of a worker that is there, and again when the event is set."""
    address, over, listening, again = fresh_address("shm"), threading.Event(), threading.Event(), threading.Event()

    def live() -> None:
        while not over.is_set():
            with closing(listen(address)) as listener:
                worker.listener = listener
                listening.set()
                worker.serve(listener)
            again.wait()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert listening.wait(LIMIT_S)
    try:
        yield address, again
    finally:
        over.set()
        again.set()
        worker.listener.interrupt()
        thread.join(LIMIT_S)
