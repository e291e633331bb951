"""Which connections are handed out: those whose own key was verified, lately."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.evidence_server import honest
from tests.client.upstream import Upstream, filled, settled
from tests.tee.certificates import key_pair
from tests.tee.policies import policy
from tsqp.client.address import parse_server
from tsqp.client.pinning import SPARE_S, Pinned, PinnedServer
from tsqp.errors import EvidenceRefused, TsqpError
from tsqp.tee.collateral import Without
from tsqp.tee.verification import spki_sha256

FIRST, SECOND = key_pair(), key_pair()
MAX_AGE_S = 100.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Kept(PinnedServer):
    """Remembers what it has handed out, so that it can be closed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opened: list[Pinned] = []

    async def open(self) -> Pinned:
        self.opened.append(await super().open())
        return self.opened[-1]


Case = Callable[[Upstream, PinnedServer, Clock], Awaitable[None]]


def run(case: Case, directory: Path) -> None:
    async def whole() -> None:
        upstream, clock = Upstream(FIRST, directory), Clock()
        async with upstream.running() as address:
            pinned = Kept(parse_server(address), policy(["none"]), Without(), max_age_s=MAX_AGE_S, clock=clock)
            try:
                await case(upstream, pinned, clock)
            finally:
                pinned.close()
                for one in pinned.opened:
                    one.close()
        await settled()
        assert upstream.requests == []

    asyncio.run(whole())


def key(pair: object) -> str:
    return spki_sha256(pair.der).hex()  # type: ignore[attr-defined]


def test_the_key_of_the_connection_was_verified(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        one = await pinned.open()
        assert one.key == key(FIRST)
        assert list(pinned.verified) == [key(FIRST)]
        for _ in range(3):
            assert (await pinned.open()).key == key(FIRST)
        assert upstream.questions == 1

    run(case, tmp_path)


def test_a_key_is_verified_again_when_it_is_old(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await pinned.open()
        clock.now += MAX_AGE_S
        await pinned.open()
        assert upstream.questions == 1
        clock.now += 0.5
        assert pinned.verified == {}
        await pinned.open()
        assert upstream.questions == 2

    run(case, tmp_path)


def test_a_key_grows_old_while_the_machine_is_asleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep, read = [0.0], time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda of: read(of) + asleep[0] * (of == time.CLOCK_BOOTTIME))

    async def case(upstream: Upstream, _pinned: PinnedServer, _clock: Clock) -> None:
        server = parse_server(f"https://127.0.0.1:{upstream.port}")
        pinned = PinnedServer(server, policy(["none"]), Without(), max_age_s=MAX_AGE_S)
        await pinned.verify()
        assert list(pinned.verified) == [key(FIRST)]
        asleep[0] += MAX_AGE_S
        assert pinned.verified == {}

    run(case, tmp_path)


def test_an_old_key_that_is_no_more_accepted_is_refused(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await pinned.open()
        upstream.answer = lambda _nonce: (503, b"no quote")
        clock.now += MAX_AGE_S + 1
        with pytest.raises(EvidenceRefused, match="status 503"):
            await pinned.open()
        assert pinned.refusal is not None
        upstream.answer = honest(FIRST)
        await pinned.open()
        assert pinned.refusal is None

    run(case, tmp_path)


def test_a_new_key_is_verified_before_it_is_used(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await pinned.open()
        await filled(pinned)
        clock.now += SPARE_S + 1  # what was kept ready is of the old key
        upstream.use(SECOND)
        upstream.answer = honest(SECOND)
        assert (await pinned.open()).key == key(SECOND)
        assert set(pinned.verified) == {key(FIRST), key(SECOND)}

    run(case, tmp_path)


def test_a_swapped_server_is_refused(tmp_path: Path) -> None:
    """Between verification and request; it shows the evidence of the first one."""

    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await pinned.open()
        await filled(pinned)
        clock.now += SPARE_S + 1
        upstream.use(SECOND)
        with pytest.raises(EvidenceRefused, match="certificate-sha256"):
            await pinned.open()
        assert set(pinned.verified) == {key(FIRST)}

    run(case, tmp_path)


def test_a_server_that_is_swapped_for_the_question_alone_is_refused(tmp_path: Path) -> None:
    """The connection of the request is the attacker's, that of the question goes to the honest server."""

    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        def honest_for_the_question(nonce: str) -> tuple[int, bytes]:
            return honest(FIRST)(nonce)

        upstream.use(SECOND)
        opened = pinned._connect

        async def then_swapped() -> object:
            one = await opened()
            upstream.use(FIRST)
            return one

        pinned._connect = then_swapped  # type: ignore[assignment, method-assign]
        upstream.answer = honest_for_the_question
        with pytest.raises(EvidenceRefused, match=r"spki-sha256 is .*the server has changed it"):
            await pinned.open()

    run(case, tmp_path)


def test_many_at_once_ask_once(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await asyncio.gather(*(pinned.open() for _ in range(8)))
        assert upstream.questions == 1

    run(case, tmp_path)


def test_spares_are_of_believed_keys_and_young(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await pinned.open()
        await filled(pinned)
        made = upstream.connections
        young = await pinned.open()
        assert (young.alive, young.at) == (True, clock.now)
        await filled(pinned)
        clock.now += SPARE_S + 0.1
        old = await pinned.open()
        assert old.at == clock.now  # opened now
        assert upstream.connections > made
        await filled(pinned)
        pinned._keys.clear()
        await pinned.open()
        assert upstream.questions == 2  # a spare whose key is no more believed is not handed out

    run(case, tmp_path)


def test_a_dead_spare_is_not_handed_out(tmp_path: Path) -> None:
    async def case(upstream: Upstream, pinned: PinnedServer, clock: Clock) -> None:
        await pinned.open()
        await filled(pinned)
        spares = list(pinned._spares)
        for spare in spares:
            spare.close()
        assert (await pinned.open()) not in spares

    run(case, tmp_path)


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    async def whole() -> None:
        pinned = PinnedServer(parse_server("https://127.0.0.1:1"), policy(["none"]), Without(), max_age_s=1)
        with pytest.raises(TsqpError, match=r"no connection to https://127\.0\.0\.1:1: "):
            await pinned.open()

    asyncio.run(whole())
