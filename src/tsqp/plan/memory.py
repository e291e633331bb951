"""Bytes that each party of a plan holds: ``docs/scaling.md`` §3."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.config.groups import linear_groups
from tsqp.plan.cluster import Setting, Team
from tsqp.plan.passes import cache_bytes, numbers_of, weights_of

PADS_AHEAD = 256  # tokens whose pads are kept ready by default
FLOAT_BYTES, EMBEDDING_BYTES = 4, 2


@dataclass(frozen=True)
class Memory:
    """``worker``: the most that one holds, its 8-bit weights. The others are parts of the trusted side's.

    ``weights``: the 8-bit weights, where it makes its own pads; ``vectors``: scales, biases, check vectors and
    their products with the weights; ``kv``: keys and values of all sequences; ``pads``: those kept ready.
    """

    worker: int
    embedding: int
    weights: int
    vectors: int
    kv: int
    pads: int

    @property
    def trusted(self) -> int:
        return self.embedding + self.weights + self.vectors + self.kv + self.pads


def memory(setting: Setting, team: Team) -> Memory:
    """Of each party, without what a process takes for its libraries (0.5 GB)."""
    config, groups = setting.config, linear_groups(setting.config)
    head = groups.pop("lm_head")
    inputs, outputs = numbers_of(config)
    layer = sum(-(-group.out_features // team.columns) * (group.in_features + FLOAT_BYTES) for group in groups.values())
    of_head = -(-head.out_features // team.columns) * (head.in_features + FLOAT_BYTES)
    worker = _heaviest(layer, of_head, config.num_layers, team.layers)
    masked = setting.mode == "masked"
    weights = sum(weights_of(config)) + FLOAT_BYTES * outputs if masked and not setting.dealers else 0
    vectors = FLOAT_BYTES * (2 * outputs + setting.checks * (team.columns * inputs + outputs))
    ahead = max(PADS_AHEAD, setting.batch)
    return Memory(
        worker=worker,
        embedding=EMBEDDING_BYTES * config.vocab_size * config.hidden_size,
        weights=weights,
        vectors=vectors,
        kv=setting.batch * setting.prompt * cache_bytes(config),
        pads=FLOAT_BYTES * outputs * ahead if masked else 0,
    )


def _heaviest(layer: int, head: int, layers: int, sets: int) -> int:
    """Bytes of the heaviest of so many sets of layers, the last of which has the LM head and as few layers as pays."""
    if sets == 1:
        return layer * layers + head
    others = sets - 1
    return min(max(-(-(layers - last) // others) * layer, last * layer + head) for last in range(layers + 1))
