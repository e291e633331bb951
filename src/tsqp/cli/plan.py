"""``tsqp plan``: what a cluster would give, before anybody rents it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tsqp.cli.arguments import Json
from tsqp.cli.flags import size


def plan(
    *,
    model: Annotated[
        str, Parameter(name=("--model", "-m"), help="1b, 8b, 70b or 405b (shapes of Llama 3), or as for tsqp generate.")
    ] = "8b",
    workers: Annotated[int, Parameter(help="All workers together.")] = 1,
    columns: Annotated[int | None, Parameter(help="Parts of each linear group; the best when not given.")] = None,
    layers: Annotated[int | None, Parameter(help="Sets of layers; the best when not given.")] = None,
    replicas: Annotated[int | None, Parameter(help="Teams that hold the same; the best when not given.")] = None,
    protection: Annotated[Literal["masked", "verified"], Parameter(help="What workers see.")] = "masked",
    link: Annotated[
        str, Parameter(help="Rate of each machine's link, each way, such as 100Gbit; shm: all on one machine.")
    ] = "100Gbit",
    plain: Annotated[
        bool | None, Parameter(help="tcp without keys (--insecure-plain-tcp): nothing is enciphered.")
    ] = None,
    rtt: Annotated[str | None, Parameter(help="There and back; 0.1ms when not given.")] = None,
    loss: Annotated[
        float | None, Parameter(help="Share of packets that is lost, each way, such as 0.001; none when not given.")
    ] = None,
    cores: Annotated[int, Parameter(help="Cores of the trusted side.")] = 32,
    device: Annotated[str, Parameter(help="What a worker computes on: cpu or h200.")] = "cpu",
    worker_cores: Annotated[
        int | None, Parameter(help="Cores of a worker on a cpu; those that were measured when not given.")
    ] = None,
    worker_memory: Annotated[
        int | None, Parameter(converter=size, help="Of each worker, such as 80GB; that of the device when not given.")
    ] = None,
    dealers: Annotated[int, Parameter(help="Devices like the workers' that make pads; 0: the trusted side does.")] = 0,
    checks: Annotated[int, Parameter(help="Check vectors.")] = 2,
    batch: Annotated[int, Parameter(help="Sequences that decode together.")] = 1,
    prompt: Annotated[int, Parameter(help="Tokens of a prompt; decode comes after so many.")] = 1024,
    micro_batches: Annotated[int, Parameter(help="Parts of a prompt that cross the layers in turn.")] = 1,
    constants: Annotated[Path | None, Parameter(help="Measured by tsqp bench constants on your own machine.")] = None,
    json_output: Json = False,
) -> None:
    """Say what a cluster would give: rates, the bottleneck, memory of each party. From measured constants alone."""
    from tsqp.plan.cluster import Link, Setting, teams
    from tsqp.plan.constants import load
    from tsqp.plan.report import lines
    from tsqp.plan.report import plan as planned
    from tsqp.plan.shapes import shape_of

    config = shape_of(model)
    setting = Setting(
        config,
        protection,
        Link.parse(link, rtt, loss, plain),
        cores,
        device,
        worker_cores,
        worker_memory,
        dealers,
        checks,
        batch,
        prompt,
        micro_batches=micro_batches,
    )
    found = {"model": model, **planned(load(constants), setting, teams(config, workers, columns, layers, replicas))}
    if json_output:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for line in lines(found):
        sys.stdout.write(line + "\n")
