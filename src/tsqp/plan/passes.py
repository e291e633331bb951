"""How long one forward pass takes, part by part: the formula of ``docs/scaling.md`` §1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from math import ceil

from tsqp.config.groups import LinearGroup, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.plan.cluster import Setting, Team
from tsqp.plan.constants import FEW_ROWS, CallKind, Constants, Device, ProductTimes

SHARE_ROWS = 64  # fewer rows of a call are not shared among replicas
MOST_REPLICAS = 4  # that one team asks
SHARED_NUMBERS = 131_072  # of a call, from where on threads of the trusted side share the rows of a step of few
LOST_S = 0.3  # until TCP sends the last packet of a message again, about: benchmarks/links.py
X_BYTES = {"masked": 4, "verified": 2}  # of a number on its way to a worker
Y_BYTES, KV_BYTES = 4, 2


@dataclass(frozen=True)
class Parts:
    """Where the seconds of a pass go. ``calls``: what calls take however small; ``numbers``: norms, masks, checks.

    ``wire``: copying and enciphering for tcp; ``round_trips``: the signal's own way; ``losses``: waits for packets that
    were lost; ``reading`` and ``multiplying``: the worker, whose ``launches`` are its own share of each call. What it
    does to x and y beside the product is part of ``multiplying``.
    """

    calls: float = 0.0
    numbers: float = 0.0
    attention: float = 0.0
    wire: float = 0.0
    sending: float = 0.0
    receiving: float = 0.0
    round_trips: float = 0.0
    losses: float = 0.0
    launches: float = 0.0
    reading: float = 0.0
    multiplying: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Parts:
        return Parts(*(times * part for part in astuple(self)))

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    @property
    def trusted(self) -> float:
        """What nobody but the trusted side works at."""
        return self.calls + self.numbers + self.attention + self.wire

    @property
    def worker(self) -> float:
        return self.launches + self.reading + self.multiplying

    def overlapped(self, micro_batches: int) -> float:
        """Seconds where so many parts of a chunk take turns: the busiest party's time, and a share of the others'."""
        busiest = max(self.trusted, self.sending, self.receiving, self.worker)
        return busiest + (self.total - busiest) / micro_batches

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(fields(self), key=lambda one: getattr(self, one.name)).name


@dataclass(frozen=True)
class Model:
    """A setting with its constants and a team."""

    constants: Constants
    setting: Setting
    team: Team

    @property
    def device(self) -> Device:
        return self.constants.devices[self.setting.device]

    def decode(self) -> Parts:
        """A step: a row of each of ``batch`` sequences after their prompts."""
        one = self.setting
        keys = one.batch * one.prompt * cache_bytes(one.config)
        attention = Parts(attention=keys * self.constants.trusted.cache_byte_s / one.cores)
        return self._calls(one.batch, one.batch, compiled=one.batch <= FEW_ROWS) + attention

    def prefill(self) -> Parts:
        """One prompt, one part after another."""
        return sum((parts for parts, _ in self._chunks()), Parts())

    def prefill_s(self) -> float:
        """Seconds of one prompt, the parts of each chunk in turn."""
        return sum(parts.overlapped(turns) for parts, turns in self._chunks())

    def _chunks(self) -> Iterator[tuple[Parts, int]]:
        """A prompt crosses the layers in chunks, and each of them as micro-batches, no more than it has rows."""
        one = self.setting
        for first in range(0, one.prompt, one.chunk):
            end = min(first + one.chunk, one.prompt)
            turns = min(one.micro_batches, end - first)
            calls = self._calls((end - first) / turns, 0, compiled=False) * turns
            head = self._head(1, compiled=False) if end == one.prompt else Parts()
            flop = attention_flop(one.config, end) - attention_flop(one.config, first)
            yield calls + head + Parts(attention=flop * self.constants.trusted.flop_s / one.cores), turns

    def _calls(self, rows: float, sampled: float, *, compiled: bool) -> Parts:
        """All calls of a pass over ``rows`` rows, ``sampled`` of which ask for logits."""
        groups = linear_groups(self.setting.config)
        layer = Parts()
        for name, group in groups.items():
            layer = layer + (Parts() if name == "lm_head" else self._call(group, rows, compiled=compiled))
        head = self._head(sampled, compiled=compiled) if sampled else Parts()
        return layer * self.setting.config.num_layers + head

    def _head(self, rows: float, *, compiled: bool) -> Parts:
        return self._call(linear_groups(self.setting.config)["lm_head"], rows, compiled=compiled)

    def _call(self, group: LinearGroup, rows: float, *, compiled: bool) -> Parts:
        one, team, trusted = self.setting, self.team, self.constants.trusted
        transport, wide, out = one.link.transport, group.in_features, group.out_features
        replicas = int(max(1, min(team.replicas, MOST_REPLICAS, rows // SHARE_ROWS)))
        asked = team.columns * replicas  # workers of this call
        few = rows <= FEW_ROWS
        times = trusted.number_s[one.mode]
        numbers = rows * (wide + out) * (times.few if few else times.many)
        numbers += rows * wide * (team.columns - 1) * one.checks * trusted.dot_s
        # No second core makes these shorter. (A column has projections of its own.)
        alone = (wide * team.columns + out) * times.once if few else rows * times.row
        sent, received = rows * wide * team.columns * X_BYTES[one.mode], rows * out * Y_BYTES
        rate = one.link.rate_of(asked)
        product, shares = self._product(), group.in_features * group.out_features / team.columns
        own_rows = ceil(rows / replicas)
        worker_s = product.seconds(shares, own_rows, wide + out / team.columns)
        reading = shares * product.weight_s
        return Parts(
            calls=trusted.call_s[self._kind(compiled=compiled)] + (asked - 1) * trusted.further_call_s[transport],
            numbers=numbers / self._threads(rows, max(wide, out), compiled=compiled) + alone,
            wire=self._byte_s * enciphered(sent + received, asked, one.cores)
            + (trusted.team_byte_s * (sent + received) if team.workers > 1 else 0.0),
            sending=sent / rate,
            receiving=received / rate,
            round_trips=one.link.rtt_s,
            losses=min(1.0, 2 * asked * one.link.loss) * LOST_S,
            launches=product.call_s,
            reading=min(reading, worker_s),
            multiplying=max(0.0, worker_s - reading),
        )

    @property
    def _byte_s(self) -> float:
        """Seconds of a byte that crosses, beside the line's own; over shm it is part of a number's."""
        link, trusted = self.setting.link, self.constants.trusted
        if link.transport == "shm":
            return 0.0
        return trusted.plain_byte_s if link.plain else trusted.byte_s

    def _threads(self, rows: float, width: int, *, compiled: bool) -> float:
        """Cores that share the numbers of a call: slices of 16 rows, or rows of a compiled step if there are many."""
        if rows > FEW_ROWS:
            return min(self.setting.cores, ceil(rows / FEW_ROWS))
        shared = self._kind(compiled=compiled) == "step" and rows * width >= SHARED_NUMBERS
        return min(self.setting.cores, ceil(rows)) if shared else 1

    def _kind(self, *, compiled: bool) -> CallKind:
        """How a call is made: one worker is asked directly, several are a team."""
        transport = self.setting.link.transport
        if self.team.workers > 1:
            return "team_shm" if transport == "shm" else "team_tcp"
        return "step" if compiled and transport == "shm" else transport

    def _product(self) -> ProductTimes:
        """The worker's, which has its cores or those that were measured."""
        return scaled(self.device.products[self.setting.mode], self.device.cores, self.setting.worker_cores)


def enciphered(crossed: float, connections: int, cores: int) -> float:
    """Bytes that one after another are copied and enciphered: each connection has a thread of its own, at each end.

    The connections are equal. On the trusted side, which does half of the work, they share ``cores``.
    """
    return max(crossed / connections, crossed / 2 / min(connections, cores))


def scaled(product: ProductTimes, measured: int | None, cores: int | None) -> ProductTimes:
    """Of a processor with ``cores`` cores instead of ``measured``, and as many times the bandwidth of its memory."""
    if measured is None or cores is None:
        return product
    of = measured / cores
    times = (product.weight_s, product.few_s, product.many_s, product.number_s)
    return ProductTimes(product.call_s, *(of * one for one in times))


def in_tee(constants: Constants, setting: Setting) -> tuple[float, float]:
    """Seconds of a prompt and of a step where the trusted side's cores compute everything, by 8-bit weights.

    Attention is that of the private modes, and what each call takes however small it is, ``alone.call_s``, is left
    out: another program need not have the one or the other of our own ``local``.
    """
    trusted, config = constants.trusted, setting.config
    alone = scaled(trusted.alone, constants.cores, setting.cores)
    layers, head = weights_of(config)
    of_layers, of_head = (sum(numbers) for numbers in numbers_by_part(config))
    prompt = alone.seconds(layers, setting.prompt, of_layers) + alone.seconds(head, 1, of_head)
    prompt += attention_flop(config, setting.prompt) * trusted.flop_s / setting.cores
    keys = setting.batch * setting.prompt * cache_bytes(config)
    step = (
        alone.seconds(layers + head, setting.batch, of_layers + of_head) + keys * trusted.cache_byte_s / setting.cores
    )
    return prompt, step


def calls_of(config: ModelConfig) -> int:
    """Calls of a pass that ends with logits."""
    return 4 * config.num_layers + 1


def weights_of(config: ModelConfig) -> tuple[int, int]:
    """Weights of all layers, and of the LM head."""
    groups = list(_groups(config))
    sizes = [times * group.in_features * group.out_features for group, times in groups]
    return sum(sizes[:-1]), sizes[-1]


def numbers_of(config: ModelConfig) -> tuple[int, int]:
    """Numbers of one row that are sent, and that come back, over all groups."""
    layers, head = numbers_by_part(config)
    return layers[0] + head[0], layers[1] + head[1]


def numbers_by_part(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same of all layers, and of the LM head, which a prompt needs for its last row alone."""
    *layers, (head, _) = _groups(config)
    sent = sum(times * group.in_features for group, times in layers)
    received = sum(times * group.out_features for group, times in layers)
    return (sent, received), (head.in_features, head.out_features)


def attention_flop(config: ModelConfig, prompt: int) -> int:
    """Multiplications and additions of q·Kᵀ and p·V of a prompt: 4 for each query, key that it sees, head and column.

    A window is not looked at: models with windows need less.
    """
    return 4 * config.num_layers * config.num_heads * config.head_dim * (prompt * (prompt + 1) // 2)


def cache_bytes(config: ModelConfig) -> int:
    """Keys and values of one token, in bfloat16."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * KV_BYTES


def _groups(config: ModelConfig) -> Iterator[tuple[LinearGroup, int]]:
    """Each group and how often a model has it, the LM head last."""
    groups: Sequence[LinearGroup] = list(linear_groups(config).values())
    for group in groups[:-1]:
        yield group, config.num_layers
    yield groups[-1], 1
