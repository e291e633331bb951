"""Threads for work on texts: an event loop must not wait for it, and its memory is bounded by few doing it at once.

A tokenizer takes some hundred bytes for each token of a text, also of a text that is then refused for its length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

from tsqp.cores import cores

T = TypeVar("T")


async def on_text_thread(work: Callable[..., T], /, *args: object, **more: object) -> T:
    """What ``work`` returns, or raises. As many are done at once as there are cores; others wait their turn."""
    return await asyncio.get_running_loop().run_in_executor(_threads(), partial(work, *args, **more))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), "tsqp-text")
