"""Memory that was freed goes back to the system, also below what is still in use in the heap of a thread."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.api.mortal import MODEL, MortalRecorder, answers, living
from tsqp import LLM
from tsqp.api.config import GuardConfig
from tsqp.api.freed_memory import HEAPS, few_heaps, give_back_freed_memory
from tsqp.arith.secret_memory import secret_array, secret_memory
from tsqp.trusted.guard.pool import PadPool

PIECE_BYTES = 40_000  # as much as the pads of a layer
PIECES = 1000


def anonymous_bytes() -> int:
    """What this process holds of memory of its own."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here: another C library has other rules")
def test_freed_pieces_below_one_in_use_are_given_back() -> None:
    pieces: list[NDArray[np.uint8]] = []

    def make() -> None:
        pieces.extend(np.ones(PIECE_BYTES, np.uint8) for _ in range(PIECES))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    in_use = pieces[::50]
    pieces.clear()
    before = anonymous_bytes()
    give_back_freed_memory()
    assert before - anonymous_bytes() > PIECES * PIECE_BYTES // 2
    assert all(piece.all() for piece in in_use)


def test_pieces_of_secret_memory_that_nobody_uses_are_given_back() -> None:
    pieces = [secret_array((PIECE_BYTES // 4,)) for _ in range(PIECES)]
    for piece in pieces:
        piece.fill(7)
    in_use = pieces[-1]
    pieces.clear()
    del piece
    before = anonymous_bytes()
    give_back_freed_memory()
    assert before - anonymous_bytes() > PIECES * PIECE_BYTES // 2
    assert (in_use == 7).all()


def test_a_model_that_is_closed_leaves_no_memory_of_pads() -> None:
    gc.collect()  # of models before: what they had would come back in between
    with living(MortalRecorder()) as address:
        with LLM(MODEL, worker=address, guard=GuardConfig(pads_ahead=64, warm_pads=True)) as llm:
            answers(llm)
            assert llm.guard is not None
            pool = llm.guard.linears.pads
            assert isinstance(pool, PadPool)
            assert list(pool._blocks)
        assert not list(pool._blocks)
        assert secret_memory().spare_bytes() == 0


COUNT_HEAPS = """
import ctypes, os, re, sys, tempfile, threading
from tsqp.api.freed_memory import few_heaps

if sys.argv[1] == "few":
    few_heaps()
library, all_there = ctypes.CDLL(None), threading.Barrier(8)
library.malloc.restype = ctypes.c_void_p

def allocate():
    all_there.wait()
    for _ in range(100):
        library.malloc(5000)
    all_there.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
library.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile("r") as found:
    stream = ctypes.c_void_p(library.fopen(found.name.encode(), b"w"))
    library.malloc_info(0, stream)
    library.fclose(stream)
    print(len(re.findall("<heap nr=", found.read())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here: another C library has other rules")
def test_threads_share_few_heaps() -> None:
    heaps = {
        asked: int(subprocess.run([sys.executable, "-c", COUNT_HEAPS, asked], capture_output=True, check=True).stdout)
        for asked in ("few", "any")
    }
    assert heaps["few"] <= HEAPS < heaps["any"]


def test_another_c_library_has_nothing_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    give_back_freed_memory()
    few_heaps()
