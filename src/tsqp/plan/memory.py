"""Bytes that each party of a plan holds: ``docs/scaling.md`` §3."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.plan.cluster import Setting, Team
from tsqp.plan.passes import cache_bytes, numbers_of, weights_of

PADS_AHEAD, PAD_MEMORY = 256, 1 << 30  # tokens whose pads a run keeps ready, in so many bytes, unless told otherwise
BLOCK_ROWS, HEAD_ROWS, KEY_BYTES = 16, 64, 32  # of pads: rows with one key; rows kept of the LM head; bytes of a key
FLOAT_BYTES, EMBEDDING_BYTES = 4, 2


@dataclass(frozen=True)
class Memory:
    """``worker``: the most that one holds, its 8-bit weights. The others are parts of the trusted side's.

    ``weights``: the 8-bit weights, where it makes its own pads; ``vectors``: scales, biases, check vectors and
    their products with the weights; ``kv``: keys and values of all sequences; ``pads``: those of ``ready_tokens``.
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
    return Memory(
        worker=worker,
        embedding=EMBEDDING_BYTES * config.vocab_size * config.hidden_size,
        weights=weights,
        vectors=vectors,
        kv=setting.batch * setting.prompt * cache_bytes(config),
        pads=pad_bytes(config, ready_tokens(setting.batch)) if masked else 0,
    )


def ready_tokens(rows: int) -> int:
    """Tokens whose pads are ready where those of a pass of ``rows`` rows are: whole blocks, and what a run keeps."""
    return BLOCK_ROWS * -(-max(PADS_AHEAD, rows) // BLOCK_ROWS)


def pad_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of a pool that has room for the pads of so many tokens."""
    *layer, head = (
        BLOCK_ROWS * FLOAT_BYTES * group.out_features + KEY_BYTES for group in linear_groups(config).values()
    )
    return tokens // BLOCK_ROWS * config.num_layers * sum(layer) + min(tokens, HEAD_ROWS) // BLOCK_ROWS * head


def _heaviest(layer: int, head: int, layers: int, sets: int) -> int:
    """Bytes of the heaviest of so many sets of layers, the last of which has the LM head and as few layers as pays."""
    if sets == 1:
        return layer * layers + head
    others = sets - 1
    return min(max(-(-(layers - last) // others) * layer, last * layer + head) for last in range(layers + 1))
