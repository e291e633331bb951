"""Connections to one server whose key was verified, and has been lately.

Covers: a connection is handed out only if the key of its own certificate was in evidence that the policy accepted, no
longer than ``max_age_s`` ago; time asleep counts (tests/client/test_pinning.py). Does not cover: what a verified
server does with what it is sent. Assumes: TLS 1.3 proves that the other end holds the key of its certificate.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tsqp.client.address import ServerAddress
from tsqp.client.asking import Shown, ask, unverified_tls
from tsqp.errors import EvidenceRefused, TsqpError
from tsqp.tee.collateral import Collateral
from tsqp.tee.elapsed import elapsed_s
from tsqp.tee.evidence import Evidence
from tsqp.tee.policy import Policy
from tsqp.tee.verification import MAKERS, Roots, spki_sha256, verify_connection

CONNECT_S = 10.0
SPARE_S = 5.0  # for which a connection is kept ready; servers wait longer for a request
SPARES = 2
MAX_KEYS = 64  # of servers behind one address


@dataclass(frozen=True)
class Verified:
    """A key that was accepted, with its evidence. ``at``: on the clock of its server, s."""

    evidence: Evidence
    at: float


@dataclass(frozen=True)
class Pinned:
    """An open connection to a verified key."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    key: str
    at: float

    def close(self) -> None:
        """At once, whatever is under way."""
        self.writer.transport.abort()

    @property
    def alive(self) -> bool:
        """As far as this side knows."""
        return not self.reader.at_eof() and not self.writer.transport.is_closing()


class PinnedServer:
    """Opens connections to ``server``. ``told`` gets a line whenever a key is accepted or refused."""

    def __init__(
        self,
        server: ServerAddress,
        policy: Policy,
        collateral: Collateral,
        *,
        max_age_s: float,
        roots: Roots = MAKERS,
        told: Callable[[str], None] = lambda _line: None,
        clock: Callable[[], float] = elapsed_s,
    ) -> None:
        self.server = server
        self.refusal: str | None = None  # the last one, as long as nothing was accepted after it
        self._policy = policy
        self._collateral = collateral
        self._max_age_s = max_age_s
        self._roots = roots
        self._told = told
        self.clock = clock
        self._keys: dict[str, Verified] = {}
        self._one_question = asyncio.Lock()
        self._spares: deque[Pinned] = deque()
        self._filling: asyncio.Task[None] | None = None
        self._tls: ssl.SSLContext = unverified_tls()

    @property
    def verified(self) -> dict[str, Verified]:
        """The keys that are believed now, by their SPKI hash."""
        return {key: one for key, one in self._keys.items() if self._fresh(key)}

    async def open(self) -> Pinned:
        """A connection to a verified key. Nothing was sent over it. Raises EvidenceRefused, TsqpError."""
        one = self._spare() or await self._opened()
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill())  # a handshake is not waited for by the next request
        return one

    async def _opened(self) -> Pinned:
        one = await self._connect()
        try:
            if not self._fresh(one.key):
                await self._verify(one.key)
            if not self._fresh(one.key):
                raise EvidenceRefused("spki-sha256", one.key, "the key that was verified: the server has changed it")
        except BaseException:
            one.close()
            raise
        return one

    def _spare(self) -> Pinned | None:
        """One that was opened lately, to a key that is believed now."""
        while self._spares:
            one = self._spares.popleft()
            if one.alive and self._fresh(one.key) and self.clock() - one.at <= SPARE_S:
                return one
            one.close()
        return None

    async def _fill(self) -> None:
        """Open connections for requests to come. What goes wrong is told to the request that needs one."""
        try:
            while len(self._spares) < SPARES:
                one = await self._connect()
                if not self._fresh(one.key):
                    one.close()
                    return
                self._spares.append(one)
        except TsqpError:
            return
        asyncio.get_running_loop().call_later(SPARE_S, self._drop_old)

    def _drop_old(self) -> None:
        while self._spares and self.clock() - self._spares[0].at >= SPARE_S:
            self._spares.popleft().close()

    def close(self) -> None:
        """Close what is kept ready."""
        if self._filling is not None:
            self._filling.cancel()
        while self._spares:
            self._spares.pop().close()

    async def verify(self) -> None:
        """Ask now, whichever key is there. Raises EvidenceRefused, TsqpError."""
        await self._verify(None)

    def _fresh(self, key: str) -> bool:
        one = self._keys.get(key)
        return one is not None and self.clock() - one.at <= self._max_age_s

    async def _verify(self, key: str | None) -> None:
        """One question at a time; who has waited for the same answer does not ask again."""
        async with self._one_question:
            if key is not None and self._fresh(key):
                return
            asked_at = self.clock()  # before: evidence is not younger than its question
            try:
                shown = await asyncio.to_thread(self._ask)
            except TsqpError as error:
                self.refusal = str(error)
                self._told(self.refusal)
                raise
            found = shown.evidence.spki_sha256
            self._keys.pop(found, None)
            self._keys[found] = Verified(shown.evidence, asked_at)
            if len(self._keys) > MAX_KEYS:
                del self._keys[next(iter(self._keys))]
            self.refusal = None
            kind, mode = shown.evidence.kind, shown.evidence.configuration.protection
            told = "no TEE, as the policy allows" if kind == "none" else kind
            self._told(f"verified: {self.server}: {told}; protection {mode}, key {found[:16]}")

    def _ask(self) -> Shown:
        shown = ask(self.server)
        verify_connection(
            shown.evidence,
            self._policy,
            self._collateral,
            nonce=shown.nonce,
            certificate=shown.certificate,
            now=time.time(),
            roots=self._roots,
        )
        return shown

    async def _connect(self) -> Pinned:
        """With the key of the other end, which nobody has looked at yet. Raises EvidenceRefused, TsqpError."""
        opening = asyncio.open_connection(self.server.host, self.server.port, ssl=self._tls)
        try:
            reader, writer = await asyncio.wait_for(opening, CONNECT_S)
        except (OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise TsqpError(f"no connection to {self.server}: {why[:200]!a}") from None
        try:
            return Pinned(reader, writer, key_of(writer), self.clock())
        except BaseException:
            writer.transport.abort()
            raise


def key_of(writer: asyncio.StreamWriter) -> str:
    """SHA-256 of the public key at the other end, hex. Raises EvidenceRefused without one."""
    tls = writer.get_extra_info("ssl_object")
    certificate = None if tls is None else tls.getpeercert(binary_form=True)
    if certificate is None:
        raise EvidenceRefused("certificate", "missing", "one of TLS")
    return spki_sha256(certificate).hex()
