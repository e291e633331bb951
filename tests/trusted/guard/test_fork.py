"""A forked process has a copy of every pad, and gets none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commands import LIMIT_S

FORK = """
import tests.cached_loops
import os
import torch
torch.set_num_threads(2)
from tests.trusted.guard.scan import shared_pads
from tests.trusted.guard.runs import FEW, MODEL, PROMPT, open_llm, sent_rows, worker_that_can_go
from tsqp.audit.capture import Capture
from tsqp.errors import InputError, PadReused
capture = Capture()
with worker_that_can_go() as (worker, _), open_llm(worker, capture) as llm:
    llm.generate(PROMPT, FEW)
    sent = len(capture.messages)
    lock = llm.guard.linears.pads._lock
    lock.acquire()  # as another thread may have done at that moment
    child = os.fork()
    if child:
        lock.release()
    else:
        refused = 0
        pool = llm.guard.linears.pads
        asked = (lambda: llm.generate(PROMPT, FEW), lambda: pool.take(("qkv", 0), 1), lambda: pool.make(("qkv", 0), 1))
        for ask, expected in zip(asked, (InputError, PadReused, PadReused), strict=True):
            try:
                ask()
            except expected as error:
                refused += "fork" in str(error)
        os._exit(0 if refused == 3 and len(capture.messages) == sent else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    llm.generate(PROMPT, FEW)
assert not shared_pads(sent_rows(capture))
print("ok", len(sent_rows(capture)))
"""


@pytest.mark.slow
def test_a_forked_process_sends_nothing() -> None:
    """Also where it would wait for threads or locks that the fork has left behind."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok")
