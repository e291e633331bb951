"""``tsqp proxy``: an OpenAI endpoint on this machine, before a server that is verified."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tsqp.cli.arguments import Collateral
from tsqp.errors import InputError, OptionError

if TYPE_CHECKING:
    from tsqp.client.pinning import PinnedServer
    from tsqp.client.proxy import Proxy


def proxy(
    *,
    server: Annotated[str, Parameter(help="The server: https://host:port.")],
    policy: Annotated[Path, Parameter(help="What is accepted: a TOML file, docs/attestation.md.")],
    collateral: Collateral = None,
    port: Annotated[int, Parameter(help="Of 127.0.0.1, for clients of this machine; 0 takes a free one.")] = 8080,
    max_age: Annotated[float, Parameter(help="Seconds after which a key is verified again.")] = 3600.0,
    json_output: Annotated[bool, Parameter(name="--json", help="Print the address as one JSON object.")] = False,
) -> None:
    """Verify a server, then pass requests of any OpenAI client on to it, until Ctrl-C.

    Nothing of a request leaves before the key at the other end was verified. State: http://127.0.0.1:PORT/status.
    """
    from tsqp.client.address import parse_server
    from tsqp.client.pinning import PinnedServer
    from tsqp.client.proxy import Proxy
    from tsqp.tee.collateral import collateral_from
    from tsqp.tee.policy import read_policy

    if not 0 <= port <= 65535:
        raise OptionError("--port must be 0 to 65535")
    if not max_age > 0:
        raise OptionError("--max-age must be more than 0 s")
    address, wanted, given = parse_server(server), read_policy(policy), collateral_from(collateral)
    pinned = PinnedServer(address, wanted, given, max_age_s=max_age, told=_tell)
    asyncio.run(_run(pinned, Proxy(pinned), port, as_json=json_output))


async def _run(pinned: PinnedServer, passing: Proxy, port: int, *, as_json: bool) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        listening = await passing.listen(port)
    except OSError as error:
        raise InputError(
            f"port {port} of 127.0.0.1 cannot be listened on: {error.strerror}; give another as --port"
        ) from None
    try:
        first, waiting = asyncio.create_task(pinned.verify()), asyncio.create_task(ended.wait())
        await asyncio.wait((first, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            return
        first.result()
        own = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        shown = {"address": own, "server": str(pinned.server)}
        sys.stdout.write((json.dumps(shown) if as_json else f"ready: {own}, state at /status") + "\n")
        sys.stdout.flush()
        await waiting
    finally:
        listening.close()
        pinned.close()


def _tell(line: str) -> None:
    sys.stderr.write(f"tsqp proxy: {line}\n")
