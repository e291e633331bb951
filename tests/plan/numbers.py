"""Constants and a model whose sums can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from tsqp.bench.probe import ALONE, NOTHING, UNKNOWN
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.constants import Constants, Device, ProductTimes
from tsqp.plan.passes import Model

TINY = SHAPES["tiny"]  # hidden 64, inner 128, 2 layers, 4 and 2 heads of 16, vocabulary 512
SHM, SLOW = Link(None), Link(1e6, 0.5)
# x of one row: qkv 64, o 64, gate_up 64, down 128; y: 128, 64, 256, 64; of the head 64 and 512.
X_LAYER, Y_LAYER, WEIGHTS_LAYER = 320, 512, 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64


def constants(worker: ProductTimes = NOTHING, memory: int | None = None, **of_trusted: object) -> Constants:
    """Everything costs nothing but what is named."""
    products = {"masked": worker, "verified": worker}
    device = Device("nowhere", 2, memory, products)  # type: ignore[arg-type]
    trusted = msgspec.structs.replace(UNKNOWN, **of_trusted)
    return Constants("constants", 2, trusted, {"cpu": device}, {})


def running(**of_trusted: object) -> Constants:
    """The same, but a call takes a moment, and so does everything in the TEE: for what divides by times."""
    moment = dict.fromkeys(("step", "shm", "tcp", "team_shm", "team_tcp"), 1e-9)
    small = {"call_s": moment, "alone": ProductTimes(0.0, 1e-12, 0.0, 0.0), "pad_number_s": 1e-12}
    return constants(**{**small, **of_trusted})  # type: ignore[arg-type]


def model(known: Constants, team: Team = ALONE, **of_setting: object) -> Model:
    """Of the tiny model, masked, over shm, with one core."""
    setting = Setting(TINY, "masked", SHM, 1, "cpu", prompt=32)
    return Model(known, replace(setting, **of_setting), team)  # type: ignore[arg-type]
