"""What the tests run in processes of their own; apart, because a child imports the module of its function."""

from __future__ import annotations

import resource
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from tests.commands import LIMIT_S
from tsqp.checkpoint.default import PinnedModel, fetch_default
from tsqp.errors import FetchError


def fetch_together(pin: PinnedModel, barrier: Barrier, results: Queue[str]) -> None:
    barrier.wait(LIMIT_S)
    results.put(str(fetch_default(progress=False, pin=pin)))


def fetch_with_limit(pin: PinnedModel, file_bytes: int, results: Queue[str]) -> None:
    """With no file allowed to become longer than ``file_bytes``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        fetch_default(progress=False, pin=pin)
        results.put("fetched")
    except FetchError as error:
        results.put(str(error))
