"""``tsqp cluster``: workers on one machine or many, placed by Ray. For the untrusted side."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tsqp.cli.arguments import Json
from tsqp.config.worker_options import device_name
from tsqp.errors import AddressError, OptionError

if TYPE_CHECKING:
    from tsqp.cluster.registry import View
    from tsqp.cluster.state import Record
    from tsqp.wire.transport.address import Address

cluster_app = App(name="cluster", help="Place the workers of a model, on one machine or many. For the untrusted side.")

Name = Annotated[str, Parameter(help="The name of the cluster; two of one machine differ by it.")]
Replicas = Annotated[int | None, Parameter(help="How many workers hold each shard.")]


@cluster_app.command
def up(
    *,
    model: Annotated[
        str, Parameter(name=["--model", "-m"], help="As for tsqp worker, the same on each node.")
    ] = "default",
    workers: Annotated[int | None, Parameter(help="How many in all; alone, that many columns.")] = None,
    columns: Annotated[int | None, Parameter(help="Into how many parts output features are divided.")] = None,
    layers: Annotated[int | None, Parameter(help="Into how many sets layers are divided.")] = None,
    replicas: Replicas = None,
    shard: Annotated[
        tuple[str, ...], Parameter(help="A shard, as 0..17/0..1of2, in place of the three; may be given again.")
    ] = (),
    device: Annotated[str, Parameter(help="Where each worker computes: cpu, cuda, or cuda:0,cuda:1.")] = "cpu",
    threads: Annotated[int | None, Parameter(help="CPU threads of each worker.")] = None,
    interface: Annotated[
        str, Parameter(help="Where workers and front listen: an address of this machine.")
    ] = "127.0.0.1",
    allow: Annotated[
        tuple[Path, ...],
        Parameter(help="Public CURVE key of a trusted side; each worker then has keys. May be given again."),
    ] = (),
    address: Annotated[
        str | None,
        Parameter(help="A Ray that is there, host:port; one of this machine alone is started when not given."),
    ] = None,
    token: Annotated[Path | None, Parameter(help="With --address: the file with that Ray's token.")] = None,
    nodes: Annotated[int, Parameter(help="Nodes of a Ray that is started here: each stands for a machine.")] = 1,
    timeout: Annotated[float, Parameter(help="Seconds until all workers have to listen.")] = 600.0,
    name: Name = "default",
    json_output: Json = False,
) -> None:
    """Start workers that hold a model together, and a front that says where they are."""
    _check_installed()
    _check(threads, nodes, timeout)
    worker_device = _device(device)
    from tsqp.wire.transport.address import in_brackets

    where = _address("--interface", f"{in_brackets(interface)}:0")
    there = None if address is None else _address("--address", address)
    _check_keys(where, there, allow)
    if (address is None) != (token is None):
        raise OptionError("--address and --token go together: a Ray that is there, and the file with its token")
    if address is not None and nodes != 1:
        raise OptionError("--nodes is for a Ray that is started here: the one at --address has its own")
    from tsqp.checkpoint import open_checkpoint
    from tsqp.cluster.control import JoinedRay
    from tsqp.cluster.control import up as begin
    from tsqp.cluster.layout import layout_of
    from tsqp.cluster.state import Started
    from tsqp.wire.transport.keys import load_public

    config = open_checkpoint(model).config
    layout = layout_of(config, workers=workers, columns=columns, layers=layers, replicas=replicas, shards=shard)
    keys = tuple(load_public(path).decode("ascii") for path in allow)
    started = Started(_resolved(model), worker_device, threads, where.target.rpartition(":")[0], keys)
    joined = None if there is None or token is None else JoinedRay(there.target, token)
    view = begin(name, layout, started, joined=joined, nodes=nodes, timeout_s=timeout)
    _show(name, view, as_json=json_output)


@cluster_app.command
def status(*, name: Name = "default", json_output: Json = False) -> int:
    """Show workers, shards, nodes, states, restarts, epoch and front. Exit code 1 where a worker does not listen."""
    _check_installed()
    from tsqp.cluster.control import status as look

    record, view = look(name)
    _show(name, view, as_json=json_output, record=record)
    return 0 if view.front and all(entry.state == "listening" for entry in view.workers) else 1


@cluster_app.command
def scale(
    *,
    workers: Annotated[int | None, Parameter(help="How many in all: a multiple of the number of shards.")] = None,
    replicas: Replicas = None,
    timeout: Annotated[float, Parameter(help="Seconds until new workers have to listen.")] = 600.0,
    name: Name = "default",
    json_output: Json = False,
) -> None:
    """Start more workers for each shard, or end some. Answers that are under way go on."""
    _check_installed()
    from tsqp.cluster.control import scale as change

    _check_timeout(timeout)
    if (workers is None) == (replicas is None):
        raise OptionError("give either --workers or --replicas")
    view = change(
        name,
        lambda layout: layout.with_workers(workers or 0) if replicas is None else layout.with_replicas(replicas),
        timeout_s=timeout,
    )
    _show(name, view, as_json=json_output)


@cluster_app.command
def down(*, name: Name = "default") -> None:
    """End workers and front, and the Ray that was started for them. Nothing is left."""
    _check_installed()
    from tsqp.cluster.control import down as end

    sys.stdout.write(f"cluster {name} is down\n" if end(name) else f"there was no cluster {name}\n")


def _check_installed() -> None:
    """Raises OptionError where Ray is not installed, or the code of the untrusted side."""
    if find_spec("tsqp.cluster") is None:
        raise OptionError("this installation is the trusted side alone: workers are placed from the untrusted side")
    from tsqp.cluster.own_ray import check_installed

    check_installed()


def _check(threads: int | None, nodes: int, timeout: float) -> None:
    """Raises OptionError."""
    for flag, value in (("--nodes", nodes), ("--threads", threads)):
        if value is not None and value < 1:
            raise OptionError(f"{flag} must be at least 1, not {value}")
    _check_timeout(timeout)


def _check_timeout(timeout: float) -> None:
    """Raises OptionError."""
    if not timeout > 0:
        raise OptionError("--timeout must be more than 0 s")


def _device(text: str) -> str:
    """Its name to the workers. Raises OptionError for a GPU that none of them would find."""
    device = device_name(text)
    names = device.split(",")
    counted = [f"cuda:{number}" for number in range(len(names))]
    if names not in (["cpu"], ["cuda"]) and sorted(names) != sorted(counted):
        raise OptionError(
            f"--device {text}: cpu or cuda; Ray gives each worker GPUs of its own, which count from 0 there, so "
            "several are cuda:0,cuda:1"
        )
    return device


def _address(flag: str, text: str) -> Address:
    """Host and port. Raises OptionError."""
    from tsqp.wire.transport.address import parse_address

    try:
        return parse_address(f"tcp://{text}")
    except AddressError as error:
        raise OptionError(f"{flag}: {error}") from None


def _check_keys(interface: Address, address: Address | None, allow: tuple[Path, ...]) -> None:
    """Raises OptionError where others could reach workers without keys."""
    others = [] if interface.is_loopback else [f"--interface {interface.host}"]
    others += [] if address is None or address.is_loopback else [f"--address {address.target}"]
    if others and not allow:
        raise OptionError(
            f"{' and '.join(others)}: others can reach the workers, and workers without keys serve anybody: give "
            "--allow, the public key of a trusted side (tsqp keys)"
        )


def _resolved(model: str) -> str:
    """A path without the directory that this process is in: actors are elsewhere."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def _show(name: str, view: View, *, as_json: bool, record: Record | None = None) -> None:
    if as_json:
        import msgspec

        shown = {"name": name, **msgspec.to_builtins(view)}
        shown |= {} if record is None else {"model": record.started.model, "ray": record.ray}
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    lines = [f"cluster {name}, epoch {view.epoch}, front {view.front or 'gone, being started again'}"]
    for entry in view.workers:
        where = entry.address or "-"
        restarts = f", {entry.restarts} restarts" if entry.restarts else ""
        lines.append(
            f"{entry.number:>4}  {entry.shard:18} {entry.state:10} {where:28} node {entry.node or '-'}{restarts}"
        )
    sys.stdout.write("".join(f"{line}\n" for line in lines))
