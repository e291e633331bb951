"""One server from its first socket to its last answer.

The sockets are taken before the model is loaded, so that a port in use is known at once. Told to end, the server says
so on ``/readyz``, takes nothing new, lets answers go on for a while, ends the rest with an error, and ends. Told a
second time it ends at once. A server that was killed leaves nothing that keeps its successor from the same address.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from tsqp.errors import OptionError, TsqpError
from tsqp.server.api_keys import KeyFile
from tsqp.server.app import create_app
from tsqp.server.attestation import Attester, attester_of
from tsqp.server.attested_keys import AttestedKeys
from tsqp.server.connection import Bounds, bounded
from tsqp.server.console.console import open_console
from tsqp.server.discreet import about, log_of_loop, told, write_logs
from tsqp.server.guards.faults import Faults, exception_handlers
from tsqp.server.guards.headers import AnswerHeaders
from tsqp.server.guards.hosts import Hosts, is_wildcard, names_for
from tsqp.server.json_log import LogFormat, formatter_of
from tsqp.server.lifecycle import Lifecycle
from tsqp.server.listening import Listening, bind, bind_unix, port_of
from tsqp.server.metrics import PrometheusMeters, metrics_route
from tsqp.server.ready import Ready, fingerprint_of, since_start_s, url
from tsqp.server.receipts import receipts_of
from tsqp.server.service import Service
from tsqp.server.settings import ServerSettings
from tsqp.service_manager import READY, STOPPING, notify
from tsqp.tee.providers import Gramine, provider_of

if TYPE_CHECKING:
    from tsqp.api.async_llm import AsyncLLM
    from tsqp.api.llm import LLM

KEPT_S = 20  # a connection without a request; clients end theirs after 5 s (httpx) to 15 s (aiohttp), and must be first
GRACE_S = 5.0  # for the last bytes of answers, once they were ended
STUCK_S = 10.0  # for the model to be closed, once nothing is computed; then a worker does not answer
METRICS_CONNECTIONS = 32
ENCLAVE_MEMORY = Path("/tmp")  # under Gramine: the manifest, which is measured, says so  # noqa: S108
EXIT_STUCK = 1

log = logging.getLogger("tsqp.server")


def serve(
    open_llm: Callable[[], LLM],
    listening: Listening,
    settings: ServerSettings,
    *,
    names: Sequence[str],
    api_keys: Path | None = None,
    log_format: LogFormat = "text",
    evidence: str | None = None,
    evidence_entry: Path | None = None,
    announce: Callable[[Ready], None],
) -> None:
    """Serve a model until the process is told to end; returns when everything has ended.

    ``open_llm`` is called once the sockets are taken. ``names``: what clients may call the model. ``evidence``: where
    quotes come from (tsqp.tee.providers), ``evidence_entry`` a directory that is theirs; the server makes its own key
    for TLS then. Raises TsqpError for what cannot
    be served, and all that ``open_llm`` raises. Signals and logs are this function's: run it once, in the
    main thread of a process of its own.
    """
    keys = None if api_keys is None else KeyFile(api_keys)
    attested = None if evidence is None else AttestedKeys()
    listening.check(has_keys=keys is not None, own_tls=attested is not None)
    if evidence_entry is not None and evidence is None:
        fields = ("server.evidence_entry", "server.evidence")
        raise OptionError("server.evidence_entry needs server.evidence", fields=fields)
    provider = None if evidence is None else provider_of(evidence, evidence_entry)
    tls = listening.tls() if attested is None else attested.tls(ENCLAVE_MEMORY if evidence == Gramine.name else None)
    with ExitStack() as held:
        sockets, unlink = _sockets(listening)
        held.callback(unlink)
        for one in sockets:
            held.enter_context(one)
        metrics_sockets = (
            []
            if listening.metrics_port is None
            else [
                held.enter_context(one) for one in bind(listening.metrics_host, listening.metrics_port, of="metrics_")
            ]
        )
        write_logs(formatter_of(log_format))
        llm = open_llm()
        held.callback(llm.close)
        attester = None
        if provider is not None and attested is not None:
            attester = attester_of(llm, provider, attested)
            attester.check()
        running = Running(llm, listening, settings, tuple(names), keys, attester, unlink)
        asyncio.run(running.run(sockets, metrics_sockets, tls, announce))


def _sockets(listening: Listening) -> tuple[list[socket], Callable[[], None]]:
    """Bound, and what removes the one that is in the file system, once it is over."""
    path = listening.unix_socket
    if path is None:
        return bind(listening.host, listening.port), lambda: None
    bound = bind_unix(path)
    return [bound], partial(_unlink, path, path.lstat().st_ino)


def _unlink(path: Path, inode: int) -> None:
    """Remove a socket, unless another has taken its place."""
    with suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


class Running:
    """The model and what answers for it, from the moment on at which it is loaded. ``unlink``: see ``_sockets``."""

    def __init__(
        self,
        llm: LLM,
        listening: Listening,
        settings: ServerSettings,
        names: tuple[str, ...],
        keys: KeyFile | None,
        attester: Attester | None,
        unlink: Callable[[], None],
    ) -> None:
        self._llm = llm
        self._listening = listening
        self._settings = settings
        self._names = names
        self._keys = keys
        self._attester = attester
        self._unlink = unlink
        self._lifecycle = Lifecycle()
        self._servers: list[uvicorn.Server] = []
        self._tls: ssl.SSLContext | None = None

    async def run(
        self,
        sockets: Sequence[socket],
        metrics_sockets: Sequence[socket],
        tls: ssl.SSLContext | None,
        announce: Callable[[Ready], None],
    ) -> None:
        """Answer until told to end. Raises OSError where a socket cannot be listened on after all."""
        from tsqp.api.async_llm import AsyncLLM  # with it comes torch, which is loaded while a worker starts

        loop, told_to_end = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(log_of_loop)
        self._tls = tls
        model = AsyncLLM(self._llm)
        meters = PrometheusMeters(model, self._names[0])
        protection = self._llm.plan.protection.name
        console = open_console(self._llm) if self._settings.console else None
        fingerprint = fingerprint_of(self._llm)
        service = Service(
            model,
            self._names,
            self._settings,
            protection,
            fingerprint,
            meters,
            console,
            self._attester,
            None if self._attester is None else receipts_of(self._llm, self._attester),
            adapters=tuple(self._llm.adapters),
        )
        app = create_app(service, keys=self._keys, lifecycle=self._lifecycle, answered=meters.answered)
        limits = self._settings
        tasks = [self._start(app, sockets, tls, limits.max_connections)]
        if metrics_sockets:
            page = _metrics_app(meters, self._listening.metrics_host)
            tasks.append(self._start(page, metrics_sockets, None, METRICS_CONNECTIONS))
        with self._heeding_signals(told_to_end):
            while not all(server.started for server in self._servers) and not any(task.done() for task in tasks):
                await asyncio.sleep(0.005)
            if not any(task.done() for task in tasks):
                announce(self._ready(sockets, metrics_sockets, protection))
                notify(READY, f"STATUS=answering, protection {protection}")
            ends = asyncio.create_task(told_to_end.wait())
            await asyncio.wait([ends, *tasks], return_when=asyncio.FIRST_COMPLETED)
            ends.cancel()
            await self._drain(model)
            for server in self._servers:
                server.should_exit = True
            await asyncio.gather(*tasks)

    def _start(
        self, app: ASGIApp, sockets: Sequence[socket], tls: ssl.SSLContext | None, connections: int
    ) -> asyncio.Task[None]:
        """One uvicorn, without logs of requests, without names of programs in its answers."""
        limits = self._settings
        config = uvicorn.Config(
            app,
            http=bounded(Bounds(connections, limits.head_s, limits.stall_s)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=limits.max_head_bytes,
            timeout_keep_alive=KEPT_S,
            timeout_graceful_shutdown=round(GRACE_S),
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
        server = _Server(config)
        self._servers.append(server)
        return asyncio.create_task(server.serve(list(sockets)))

    def _ready(self, sockets: Sequence[socket], metrics_sockets: Sequence[socket], protection: str) -> Ready:
        at = self._listening
        if at.unix_socket is not None:
            address = f"unix:{at.unix_socket}"
        else:
            address = url(at.host, port_of(sockets), tls=self._tls is not None)
        metrics = f"{url(at.metrics_host, port_of(metrics_sockets))}/metrics" if metrics_sockets else None
        return Ready(address, metrics, self._names[0], protection, since_start_s())

    async def _drain(self, model: AsyncLLM) -> None:
        """Let answers end, then end them, then close the model, unless a worker that is silent keeps it open."""
        self._lifecycle.draining = True
        notify(STOPPING, "STATUS=letting answers under way end")
        drain_s = self._settings.drain_s
        log.info(
            "ending: answers under way have %g s; told again, the server does not wait",
            drain_s,
            extra=about("draining"),
        )
        try:
            async with asyncio.timeout(drain_s + STUCK_S):
                await model.close(drain_s)
        except TimeoutError:
            log.error("the worker does not answer: ending without it", extra=about("worker_silent"))
            self._end_at_once(EXIT_STUCK)
        except Exception as error:
            log.error("closing the model: %s", told(error), extra=about("close_failed", error))

    @contextmanager
    def _heeding_signals(self, told_to_end: asyncio.Event) -> Iterator[None]:
        """SIGTERM and SIGINT drain, a second one ends at once; SIGHUP reads keys and certificate again."""
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            if told_to_end.is_set():
                self._end_at_once(128 + number)
            self._lifecycle.draining = True
            told_to_end.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, number)
        loop.add_signal_handler(signal.SIGHUP, self._read_again)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _read_again(self) -> None:
        if self._keys is not None:
            self._keys.read_again()
        if self._tls is not None:
            try:
                self._listening.load_certificate(self._tls)
            except TsqpError as error:
                log.error("the certificate was not read again: %s", error, extra=about("certificate_not_read"))

    def _end_at_once(self, code: int) -> NoReturn:
        """Without waiting for anybody. A worker that was started here, and may be stopped, is killed first."""
        if self._llm.worker_pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._llm.worker_pid, signal.SIGKILL)  # it has a session of its own
        self._unlink()
        os._exit(code)


class _Server(uvicorn.Server):
    """Leaves signals to ``Running``: there may be two of these."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _metrics_app(meters: PrometheusMeters, host: str) -> ASGIApp:
    """The page of metrics: no keys, but the same refusal of host names that are none of ours."""
    names = names_for(host)
    page: ASGIApp = Starlette(routes=[metrics_route(meters)], exception_handlers=exception_handlers)
    page = Hosts(page, names, any_number=is_wildcard(host))
    return AnswerHeaders(Faults(page), {})
