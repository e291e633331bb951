"""What a plan is for: a model, workers that hold it, the link to them, the trusted side, what is asked of all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.config.tiling import MOST_SLICES
from tsqp.errors import OptionError
from tsqp.plan.constants import PrivateMode, TransportKind
from tsqp.plan.units import parse_rate, parse_seconds

DEFAULT_RTT = "0.1ms"
MOST_WORKERS = 4096  # of a roster
MOST_CHECKS = 16  # vectors of a run
MOST_TOKENS = 1 << 20  # of a prompt, and of sequences that decode together
WINDOW_BYTES = 4 << 20  # under way on one connection at most: what Linux gives a socket that asks for nothing


@dataclass(frozen=True)
class Link:
    """Between the trusted side and each worker. ``rate``: bytes a second, each way, of each machine; None for shm.

    ``plain``: tcp without keys. ``loss``: the share of packets that does not arrive, each way.
    """

    rate: float | None
    rtt_s: float = 0.0
    plain: bool = False
    loss: float = 0.0

    @classmethod
    def parse(cls, rate: str, rtt: str | None, loss: float | None, plain: bool | None) -> Link:
        """From options, None for those that are not given. Raises OptionError."""
        if rate == "shm":
            for flag, value in (("--rtt", rtt), ("--loss", loss), ("--plain", plain)):
                if value is not None:
                    raise OptionError(f"{flag} is for a link that is not shm: leave it out, or give a rate with --link")
            return cls(None)
        bytes_per_s = parse_rate(rate, "--link")
        if bytes_per_s <= 0:
            raise OptionError("--link must be more than 0")
        if loss is not None and not 0 <= loss < 1:
            raise OptionError(f"--loss must be at least 0 and below 1, not {loss}")
        return cls(bytes_per_s, parse_seconds(DEFAULT_RTT if rtt is None else rtt, "--rtt"), bool(plain), loss or 0.0)

    @property
    def transport(self) -> TransportKind:
        return "shm" if self.rate is None else "tcp"

    def rate_of(self, connections: int) -> float:
        """Bytes a second that so many connections share on the trusted side: no more than windows allow."""
        if self.rate is None:
            return float("inf")
        windows = connections * WINDOW_BYTES / self.rtt_s if self.rtt_s else float("inf")
        return min(self.rate, windows)


@dataclass(frozen=True)
class Team:
    """How workers divide a model: ``columns`` parts of each group, ``layers`` sets of layers, ``replicas`` of all."""

    columns: int = 1
    layers: int = 1
    replicas: int = 1

    @property
    def workers(self) -> int:
        return self.columns * self.layers * self.replicas

    def __str__(self) -> str:
        return f"{self.columns} columns, {self.layers} sets of layers, {self.replicas} replicas"


@dataclass(frozen=True)
class Setting:
    """Everything but the team. ``cores``: of the trusted side. ``worker_cores``: of a worker that is a processor.

    ``dealers``: devices like a worker's that make pads; none: the trusted side makes them.
    """

    config: ModelConfig
    mode: PrivateMode
    link: Link
    cores: int
    device: str
    worker_cores: int | None = None
    worker_memory: int | None = None
    dealers: int = 0
    checks: int = 2
    batch: int = 1
    prompt: int = 1024
    chunk: int = 2048
    micro_batches: int = 1

    def __post_init__(self) -> None:
        names = ("cores", "checks", "batch", "prompt", "chunk", "micro_batches")
        for name in names:
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name, most in (("batch", MOST_TOKENS), ("prompt", MOST_TOKENS), ("checks", MOST_CHECKS)):
            if getattr(self, name) > most:
                raise OptionError(f"--{name} must be at most {most:,}, not {getattr(self, name):,}")
        if self.worker_cores is not None and self.worker_cores < 1:
            raise OptionError(f"--worker-cores must be at least 1, not {self.worker_cores}")
        if self.dealers < 0:
            raise OptionError(f"--dealers must be 0 or more, not {self.dealers}")
        if self.dealers and self.mode != "masked":
            raise OptionError(f"--dealers make pads, and {self.mode} has none: leave them out")
        if self.worker_memory is not None and self.worker_memory < 1:
            raise OptionError("--worker-memory must be more than 0")


def teams(
    config: ModelConfig, workers: int, columns: int | None, layers: int | None, replicas: int | None
) -> Iterator[Team]:
    """All teams of so many workers that have the parts asked for, and that a client can use. Raises OptionError where
    there is none.
    """
    for name, value in (("workers", workers), ("columns", columns), ("layers", layers), ("replicas", replicas)):
        if value is not None and value < 1:
            raise OptionError(f"--{name} must be at least 1, not {value}")
    if workers > MOST_WORKERS:
        raise OptionError(f"--workers {workers} are more than a roster has, {MOST_WORKERS}")
    most = min(MOST_SLICES, *(group.out_features for group in linear_groups(config).values()))
    found = False
    for by_columns in [columns] if columns is not None else _divisors(workers):
        if workers % by_columns or by_columns > most:
            continue
        for by_layers in [layers] if layers is not None else _divisors(workers // by_columns):
            team = Team(by_columns, by_layers, workers // by_columns // by_layers)
            if team.workers != workers or by_layers > config.num_layers + 1 or replicas not in (None, team.replicas):
                continue
            found = True
            yield team
    if not found:
        raise OptionError(
            f"{workers} workers do not make such a team: --columns times --layers times --replicas is to be --workers, "
            f"with at most {most} columns and {config.num_layers + 1} sets of layers"
        )


def _divisors(count: int) -> list[int]:
    return [one for one in range(1, count + 1) if count % one == 0]
