"""``tsqp serve``: the model as a server that OpenAI clients speak to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tsqp.api.adapters import named_paths
from tsqp.api.config import RunConfig
from tsqp.api.freed_memory import few_heaps
from tsqp.cli.flags import shown_size, size
from tsqp.cli.help_groups import LIMITS, SERVER
from tsqp.cli.options import RunOptions
from tsqp.errors import OptionError
from tsqp.server.settings import ServerSettings
from tsqp.trusted.engine.limits import Limits

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.server.listening import Listening
    from tsqp.server.ready import Ready

MAX_NAME = 128


def _server(name: str, text: str, **more: Any) -> Parameter:
    return Parameter(name=f"--{name}", group=SERVER, help=text, env_var=_variable(name), **more)


def _limit(name: str, text: str, **more: Any) -> Parameter:
    return Parameter(name=f"--{name}", group=LIMITS, help=text, env_var=_variable(name), **more)


def _variable(name: str) -> str:
    return f"TSQP_{name.upper().replace('-', '_')}"


@Parameter(name="*")
@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, who may use it, and how much of it."""

    host: Annotated[
        str, _server("host", "The address to listen on; other than loopback needs --api-keys and --tls-cert.")
    ] = "127.0.0.1"
    port: Annotated[int, _server("port", "The port to listen on; 0 for one that is free.")] = 8000
    unix_socket: Annotated[
        Path | None, _server("unix-socket", "Listen on a socket in the file system in place of host and port.")
    ] = None
    served_model_name: Annotated[
        tuple[str, ...],
        _server("served-model-name", "What clients call the model; may be given again. The end of --model by default."),
    ] = ()
    api_keys: Annotated[
        Path | None, _server("api-keys", "Let in who has one of the keys in this file, see tsqp api-key.")
    ] = None
    tls_cert: Annotated[Path | None, _server("tls-cert", "The certificate, with its chain, as PEM.")] = None
    tls_key: Annotated[Path | None, _server("tls-key", "The certificate's secret key, as PEM.")] = None
    evidence: Annotated[
        Literal["configfs-tsm", "gramine", "none"] | None,
        _server("evidence", "Show what this server is: where quotes come from. It makes its own certificate then."),
    ] = None
    evidence_entry: Annotated[
        Path | None,
        _server("evidence-entry", "For configfs-tsm: a directory of its reports that root made for this user."),
    ] = None
    insecure_exposed: Annotated[
        bool,
        Parameter(group=SERVER, help="Allow a host that others can reach without keys, or without TLS."),
    ] = False
    allow_host: Annotated[
        tuple[str, ...],
        _server("allow-host", "A further name by which clients may call this server; may be given again."),
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...],
        _server("allow-origin", "Let pages of this origin use the server, such as https://app.example."),
    ] = ()
    metrics_port: Annotated[
        int | None, _server("metrics-port", "Show metrics for Prometheus on this port, without keys; 0 for a free one.")
    ] = None
    metrics_host: Annotated[str, _server("metrics-host", "The address of the metrics.")] = "127.0.0.1"
    log_format: Annotated[
        Literal["text", "json"],
        _server("log-format", "How the log on standard error is written: lines for people, or one JSON object a line."),
    ] = "text"
    console: Annotated[
        bool,
        Parameter(
            group=SERVER,
            help="Show a page at /: a chat, and what the worker saw of each answer. It tells how many pads are left.",
        ),
    ] = False
    strict_params: Annotated[
        bool, _server("strict-params", "Refuse fields of requests that are unknown, in place of naming them.")
    ] = False
    max_running: Annotated[int, _limit("max-running", "Requests that are computed together.")] = Limits.running
    max_waiting: Annotated[int, _limit("max-waiting", "Requests in the queue; more are told to come again.")] = 256
    max_requests_per_key: Annotated[
        int | None, _limit("max-requests-per-key", "Requests of one API key at once; no bound when not given.")
    ] = None
    max_connections: Annotated[int, _limit("max-connections", "Connections of clients.")] = (
        ServerSettings.max_connections
    )
    max_body: Annotated[
        int,
        _limit(
            "max-body",
            "The most bytes of a request, or such as 8MiB.",
            converter=size,
            show_default=shown_size,
        ),
    ] = ServerSettings.max_body_bytes
    drain_s: Annotated[float, _limit("drain-s", "Seconds for answers under way, once the server is told to end.")] = (
        ServerSettings.drain_s
    )


def serve(
    *,
    run: RunOptions = RunOptions(),
    server: ServeOptions = ServeOptions(),
    json_output: Annotated[
        bool, Parameter(name="--json", group=SERVER, help="Print one JSON object when ready.")
    ] = False,
) -> None:
    """Serve the model to OpenAI clients, until Ctrl-C. A second Ctrl-C does not wait for answers under way."""
    few_heaps()
    from tsqp.server.run import serve as serve_until_told

    listening, settings, names = _listening(server), _settings(server), _names(server, run)
    log = logging.getLogger("tsqp.server")
    logged = server.log_format == "json"  # then nothing else may be written among the lines

    def open_model() -> LLM:
        from tsqp.cli.open_llm import open_llm

        limits = Limits(running=server.max_running, waiting=server.max_waiting)
        tell: Callable[[str], None] | None = None
        if logged:
            tell = partial(log.info, "%s", extra={"event": "starting"})
        elif not sys.stderr.isatty():
            tell = _log_line  # standard error is a log: what is only shown would be lost
        llm = open_llm(run, limits, tell, taps=server.console, silent=json_output)
        (tell or _log_line)(llm.read_line)
        return llm

    def announce(ready: Ready) -> None:
        told = f"ready in {ready.ready_s:.1f} s: {ready.address}/v1, model {ready.model}, protection {ready.protection}"
        more = "" if ready.metrics_address is None else f"; metrics at {ready.metrics_address}"
        more += f"; console at {ready.address}/" if server.console else ""
        if logged:
            log.info("%s%s", told, more, extra={"event": "ready"})
        else:
            _log_line(f"{told}{more}")
        if json_output:
            sys.stdout.write(json.dumps(ready._asdict()) + "\n")
            sys.stdout.flush()

    serve_until_told(
        open_model,
        listening,
        settings,
        names=names,
        api_keys=server.api_keys,
        log_format=server.log_format,
        evidence=server.evidence,
        evidence_entry=server.evidence_entry,
        announce=announce,
    )


def _log_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def api_key(
    name: str,
    /,
    *,
    file: Annotated[
        Path | None,
        Parameter(help="Append the line to this file; it and its folder are made for this user alone when missing."),
    ] = None,
) -> None:
    """Make an API key for tsqp serve. The key is shown this once: the file of --api-keys has only its hash.

    Parameters
    ----------
    name
        Whose key it is: letters, digits, dots, hyphens, underscores. Keys of one name are one tenant.
    """
    from tsqp.server.api_keys import add_line, line_for, new_key

    key = new_key()
    line = line_for(name, key)
    sys.stdout.write(f"key, give it to the client, it is shown this once: {key}\n")
    sys.stdout.flush()  # first: a key that nobody has seen is not to be in force
    if file is not None:
        add_line(file, line)
    where = f"line for the file of --api-keys: {line}" if file is None else f"its hash is in {file}"
    sys.stdout.write(f"{where}\n")


def _listening(options: ServeOptions) -> Listening:
    from tsqp.server.listening import Listening

    for name in ("port", "metrics_port"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1 << 16:
            raise OptionError(f"--{name.replace('_', '-')} must be 0 to 65535, not {value}")
    return Listening(
        host=options.host,
        port=options.port,
        unix_socket=options.unix_socket,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        metrics_host=options.metrics_host,
        metrics_port=options.metrics_port,
        insecure_exposed=options.insecure_exposed,
    )


def _settings(options: ServeOptions) -> ServerSettings:
    for name in ("max_running", "max_waiting", "max_requests_per_key", "max_connections", "max_body"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    if not 0 <= options.drain_s < 86_400:
        raise OptionError(f"--drain-s must be 0 to 86400 seconds, not {options.drain_s}")
    for origin in options.allow_origin:
        scheme, _, rest = origin.partition("://")
        if scheme not in ("http", "https") or not rest or "/" in rest or "*" in rest:
            raise OptionError("--allow-origin takes one origin, such as https://app.example: no path and no *")
    return ServerSettings(
        strict_params=options.strict_params,
        max_body_bytes=options.max_body,
        max_connections=options.max_connections,
        max_requests_per_key=options.max_requests_per_key,
        host=options.host,
        hosts=options.allow_host,
        origins=options.allow_origin,
        drain_s=options.drain_s,
        console=options.console,
    )


def _names(options: ServeOptions, run: RunConfig) -> tuple[str, ...]:
    """What clients may call the model. A path shows no directory to them."""
    names = options.served_model_name or (run.model.rstrip("/").rpartition("/")[2] or run.model,)
    for adapter in named_paths(run.compute.lora):
        taken = [name for name in names if name in {f"{one}:{adapter}" for one in names}]
        if taken:
            raise OptionError(
                f"--served-model-name {taken[0]} is the name of the adapter {adapter}: change one of them"
            )
    for name in names:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise OptionError(f"--served-model-name takes a name of 1 to {MAX_NAME} printable characters")
    return tuple(dict.fromkeys(names))
