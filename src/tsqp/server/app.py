"""Everything that answers at one address: endpoints and health, behind the guards."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.types import ASGIApp

from tsqp.server.api_keys import KeyFile
from tsqp.server.guards.chain import guarded
from tsqp.server.guards.faults import exception_handlers
from tsqp.server.health import Probe, WorkerProbe, health_routes
from tsqp.server.lifecycle import Lifecycle
from tsqp.server.routes import OPERATIONS, routes
from tsqp.server.service import Service


def create_app(
    service: Service,
    *,
    keys: KeyFile | None = None,
    lifecycle: Lifecycle | None = None,
    probe: Probe | None = None,
    answered: Callable[[int], None] = lambda _status: None,
) -> ASGIApp:
    """The server of one model as an ASGI application.

    ``keys``: who may use it; None lets everybody in. ``lifecycle``: where it is told to drain. ``probe``: what
    readiness asks; a round trip to the worker when not given. ``answered`` is told the status of each answer.
    """
    lifecycle = lifecycle or Lifecycle()
    probe = probe or WorkerProbe(service.model, service.settings.probe_s)
    every = [*routes(service), *health_routes(probe, lifecycle)]
    app = Starlette(routes=every, exception_handlers=exception_handlers)
    always = {"x-tsqp-protection": service.protection}
    pages = {one.path for one in OPERATIONS if not one.needs_key}
    if service.console is not None:
        pages.update(service.console.pages)
    return guarded(app, service.settings, lifecycle=lifecycle, keys=keys, always=always, answered=answered, pages=pages)
