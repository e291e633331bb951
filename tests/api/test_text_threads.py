"""Work on texts is done by few threads at once, and never by the event loop's."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.commands import LIMIT_S
from tsqp.api.text_threads import on_text_thread
from tsqp.cores import cores


def test_as_many_are_at_work_as_there_are_cores_and_the_loop_goes_on() -> None:
    lock, may_end = threading.Lock(), threading.Event()
    at_work, most, here = 0, 0, threading.get_ident()

    def work(number: int, *, more: int) -> int:
        nonlocal at_work, most
        assert threading.get_ident() != here
        with lock:
            at_work += 1
            most = max(most, at_work)
        may_end.wait(LIMIT_S)
        with lock:
            at_work -= 1
        return number + more

    async def run() -> list[int]:
        tasks = [asyncio.create_task(on_text_thread(work, number, more=100)) for number in range(4 * cores())]
        while at_work < cores():
            await asyncio.sleep(0)
        may_end.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == [100 + number for number in range(4 * cores())]
    assert most == cores()


def test_an_error_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(on_text_thread(lambda: 1 / 0))
