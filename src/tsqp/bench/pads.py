"""Masked runs with all pads ready, and with none: the two ends of what a user meets."""

from __future__ import annotations

import time
from dataclasses import replace

from tsqp.api.config import RunConfig
from tsqp.api.llm import LLM
from tsqp.api.pads import pool_bytes
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.bench.peer import Ours
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.filler import PadFiller
from tsqp.trusted.guard.linears import MaskedLinears
from tsqp.trusted.guard.pool import PadPool

WAIT_S = 0.01


def with_pads(run: RunConfig, tokens: int) -> RunConfig:
    """The same run; at ``masked`` with room for the pads of ``tokens`` tokens at least, so that all can be ready."""
    if not PROTECTIONS[run.protection].masked:
        return run
    ahead = max(run.guard.pads_ahead, tokens)
    memory = max(run.guard.pad_memory, pool_bytes(open_checkpoint(locate(run.model)).config, ahead))
    return replace(run, guard=replace(run.guard, pads_ahead=ahead, pad_memory=memory))


class PadsReady:
    """Runs with a pool that is full; its filler goes on meanwhile. Afterwards the pool is full again, and quiet."""

    name = "TSQP masked, pads ready"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._pool, self._filler = pads_of(llm)

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run."""
        fill(self._pool, self._filler)
        seconds = Ours(self._llm).run(tokens, steps)
        fill(self._pool, self._filler)  # or the filler would take the cores from what runs next
        return seconds


class PadsDrained:
    """Runs that start without pads, the prompt's and the first step's; the filler goes on meanwhile."""

    name = "TSQP masked, pads drained"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._pool, self._filler = pads_of(llm)

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run."""
        fill(self._pool, self._filler)  # so that nothing is being made when the pool is drained
        stats = self._llm.stats
        stats.reset()
        drain(self._pool)
        params = SamplingParams(max_tokens=steps + 1, ignore_eos=True)
        for index, _ in enumerate(self._llm.stream(tokens, params)):
            if index == 0:
                drain(self._pool)  # of what was made during the prompt: an answer from an empty pool
        seconds = stats.prefill_s, stats.decode_s
        fill(self._pool, self._filler)
        return seconds


def pads_of(llm: LLM) -> tuple[PadPool, PadFiller]:
    """The pads of a masked run. Raises OptionError for another."""
    guard = llm.guard
    if guard is None or guard.filler is None or not isinstance(guard.linears, MaskedLinears):
        raise OptionError(f"protection {llm.plan.protection.name} has no pads")
    return guard.linears.pads, guard.filler


def fill(pool: PadPool, filler: PadFiller) -> None:
    """Fill the pool, and wait for what the filler's own thread is making."""
    filler.fill()
    while any(pool.ready(key) < count * BLOCK_ROWS for key, count in filler.blocks.items()):
        time.sleep(WAIT_S)
        filler.fill()


def ready_for(llm: LLM, rows: int, answers: int) -> None:
    """At ``masked``: make the pads of ``rows`` rows, ``answers`` of them of answers, unless they are there already.

    From then on none are made ahead: what is measured next, here or elsewhere, has the cores to itself.
    """
    if not llm.plan.protection.masked:
        return
    pool, filler = pads_of(llm)
    filler.blocks = {key: -(-(answers if key[1] is None else rows) // BLOCK_ROWS) for key in pool.keys}
    fill(pool, filler)
    filler.blocks = dict.fromkeys(pool.keys, 0)


def drain(pool: PadPool) -> None:
    """Take and destroy every pad that is ready."""
    for key in pool.keys:
        for piece in pool.take(key, pool.ready(key)):
            if piece.block is not None:
                piece.block.erase(piece.at, piece.rows)
