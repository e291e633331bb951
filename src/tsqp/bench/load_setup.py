"""What ``bench load`` asks of servers, and how ours are started for it."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.api.config import RunConfig
from tsqp.api.pads import pool_bytes
from tsqp.bench.modes import MASKED, in_mode
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.cores import cores
from tsqp.errors import OptionError

LONGER = 3  # times as long as clients at once, for requests by chance: few of these come in a second
MOST_STREAMS = 64  # that our engine computes together
MOST_SHARE = 10.0  # of the best throughput: more piles up requests and shows nothing more


@dataclass(frozen=True)
class Load:
    """Prompts of ``tokens``, and ``steps`` tokens after each first one.

    Each number of ``streams`` asks for ``seconds``. Requests come for ``LONGER`` times that, at each of the ``shares``
    of the best throughput that was found. ``runs``: how often library and server take turns. ``pads``: tokens whose
    pads are ready before each of these.
    """

    streams: tuple[int, ...] = (1, 2, 4, 8, 16)
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    tokens: int = 32
    steps: int = 32
    seconds: float = 6.0
    pads: int = 2560
    runs: int = 3
    seed: int = 0

    @property
    def count(self) -> int:
        """Tokens of an answer."""
        return self.steps + 1

    @property
    def alone(self) -> int:
        """Tokens of an answer with nothing beside it."""
        return 2 * self.count

    @property
    def answers_with_pads(self) -> int:
        """Answers that the pads are enough for."""
        return self.pads // (self.tokens + self.count)

    def check(self) -> None:
        """Raises OptionError."""
        for name, value in (("tokens", self.tokens), ("steps", self.steps), ("runs", self.runs)):
            if value < 1:
                raise OptionError(f"--{name} must be at least 1, not {value}")
        if not self.streams or not all(1 <= streams <= MOST_STREAMS for streams in self.streams):
            raise OptionError(f"--streams must be 1 to {MOST_STREAMS}")
        if not all(0 < share <= MOST_SHARE for share in self.shares):
            raise OptionError(f"--share must be above 0 and at most {MOST_SHARE:g}")
        if not 0 < self.seconds < float("inf"):
            raise OptionError(f"--seconds must be above 0, not {self.seconds:g}")
        least = max(self.streams) * (self.tokens + self.count), self.tokens + self.alone
        if self.pads < max(least):
            raise OptionError(f"--pads must be at least {max(least)}: that is one answer of each stream")


def server_options(run: RunConfig, mode: str, load: Load) -> list[str]:
    """The options of ``tsqp serve`` for one of the modes.

    A masked server refuses what its pads are not ready for: so no call of what it answers makes any on the spot.
    """
    asked, model = in_mode(run, mode), locate(run.model)
    options = ["--model", model, "--protection", mode, "--threads", str(run.compute.threads or cores())]
    options += ["--device", run.worker.device]
    if mode != MASKED:
        return [*options, "--dtype", asked.compute.dtype]
    memory = pool_bytes(open_checkpoint(model).config, load.pads, whole_answers=True)
    options += ["--kv-dtype", str(asked.compute.kv_dtype)]
    return [*options, "--pads-empty", "refuse", "--pads-ahead", str(load.pads), "--pad-memory", str(memory)]
