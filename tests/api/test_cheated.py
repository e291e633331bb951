"""A worker that cheats under load: nobody gets a token that it had a hand in, and nothing is asked of it again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.api.mortal import MODEL, PARAMS, PROMPTS, MortalRecorder, answers, living
from tests.commands import LIMIT_S
from tests.trusted.guard import hostile
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import Attack, edited
from tests.trusted.guard.scan import shared_pads
from tests.trusted.step_runs import RecordingWorker
from tsqp import LLM, AsyncLLM, Completion, WorkerConfig
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.errors import ChannelError, ProductMismatch, ProtocolError, ReplyRangeError, TsqpError


class Cheat(MortalRecorder):
    """Answers one product falsely."""

    def __init__(self, attack: Attack, at: int) -> None:
        RecordingWorker.__init__(self, MODEL, attack, at)
        self.deaths, self.asked = [], 0


ATTACKS: dict[str, tuple[Attack, type[ChannelError]]] = {
    "flips one bit": (edited(hostile.flip_low_bit), ProductMismatch),
    "adds p": (edited(hostile.add_p), ReplyRangeError),
    "replays": (hostile.replayed, ProductMismatch),
    "old id": (hostile.old_id, ProtocolError),
}


@pytest.fixture(scope="module")
def undisturbed() -> list[Completion]:
    with living(MortalRecorder()) as address, LLM(MODEL, protection="verified", worker=address) as llm:
        return answers(llm)


@pytest.mark.parametrize("at", [0, 50, 130])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled step", "plain step"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("mode", MODES)
def test_streams_go_on_with_another_worker(
    mode: ProtectionName, attack: str, compiled: bool, at: int, undisturbed: list[Completion]
) -> None:
    cheat, honest = Cheat(ATTACKS[attack][0], at), MortalRecorder()
    with living(cheat) as false, living(honest) as true:
        guard = GuardConfig(compiled_step=compiled)
        with LLM(MODEL, protection=mode, worker=WorkerConfig((false, true)), guard=guard) as llm:
            assert answers(llm) == undisturbed
            assert cheat.attacked is not None
            asked = cheat.products
            state = llm.worker_state
            assert state is not None
            assert (list(state.expelled), state.address, state.reconnects) == ([false], true, 1)
            assert state.failed_checks == (attack != "old id")
            assert answers(llm) == undisturbed
            assert cheat.products == asked == cheat.attacked + 1
    if mode == "masked":
        assert not shared_pads(cheat.rows(np.uint32) + honest.rows(np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_where_there_is_no_other_every_request_ends_with_what_it_did(
    mode: ProtectionName, undisturbed: list[Completion]
) -> None:
    cheat = Cheat(edited(hostile.zeros), 100)

    async def run(llm: AsyncLLM) -> None:
        begun = [await llm.open(*asked) for asked in zip(PROMPTS, PARAMS, strict=True)]
        for answer, expected in zip(begun, undisturbed, strict=True):
            text, ended = "", None
            try:
                async for delta in answer:
                    text += delta.text
            except TsqpError as error:
                ended = error
            assert expected.text.startswith(text)
            assert isinstance(ended, ProductMismatch) or text == expected.text
        asked = cheat.products
        for _ in range(2):
            with pytest.raises(ProductMismatch, match="cheats"):
                await llm.generate(PROMPTS[0], PARAMS[0])
        assert cheat.products == asked
        state = llm.worker_state
        assert state is not None
        assert (state.state, list(state.expelled), state.failed_checks) == ("failed", [address], 1)
        llm.llm.readmit(address)
        assert await llm.generate(PROMPTS[0], PARAMS[0]) == undisturbed[0]  # it cheats once

    with living(cheat) as address:
        llm = LLM(MODEL, protection=mode, worker=address)

        async def all_of_it() -> None:
            async with AsyncLLM(llm) as served:
                await run(served)

        asyncio.run(asyncio.wait_for(all_of_it(), LIMIT_S))


def test_a_dealer_that_cheats_ends_the_run_and_accuses_no_worker() -> None:
    honest, cheat = MortalRecorder(), Cheat(edited(hostile.flip_low_bit), 3)
    with living(honest) as address, living(cheat) as dealt:
        pads: dict[str, Any] = {"pad_source": f"dealer={dealt}", "dealer_no_separation": True, "pads_ahead": 0}
        with LLM(MODEL, worker=WorkerConfig(address), guard=GuardConfig(**pads)) as llm:
            for _ in range(2):
                with pytest.raises(ProductMismatch, match="pads"):
                    answers(llm)
            assert cheat.products == 4
            state = llm.worker_state
            assert state is not None
            assert (state.expelled, state.failed_checks, state.state) == ({}, 1, "failed")
