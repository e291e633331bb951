"""The shape of a Llama-family model, as both sides must agree on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Architecture = Literal[
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "smollm3",
    "seed_oss",
    "arcee",
    "helium",
    "phi3",
    "granite",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "cohere",
    "cohere2",
]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

RopeKind = Literal["none", "default", "linear", "llama3", "yarn", "dynamic", "longrope"]
Activation = Literal["silu", "relu2", "gelu_tanh"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and its scaling.

    ``kind`` is one of

    - ``none``: nothing is rotated;
    - ``default``: no scaling;
    - ``linear``: positions are divided by ``factor``;
    - ``llama3``: low frequencies are divided by ``factor``, high ones kept, a ramp between (Llama 3.1);
    - ``yarn``: the same with a ramp over pairs, from those that turn ``beta_fast`` times within the original context to
      those that turn ``beta_slow`` times, at whole pairs if ``truncate`` (Peng et al. 2023);
    - ``dynamic``: the base grows with a text that is longer than the original context;
    - ``longrope``: each frequency has a divisor of its own, one of ``short_factors`` for texts within the original
      context and one of ``long_factors`` for longer ones (Ding et al. 2024).

    ``attention_factor`` multiplies what was rotated. ``rotary_dim``: how many numbers of each head are rotated, all for
    None: numbers i and i + head_dim/2 are a pair, and the first rotary_dim/2 pairs are turned.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    rotary_dim: int | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def follows_length(self) -> bool:
        """Whether how a position is rotated depends on how long the text is."""
        return self.kind in ("dynamic", "longrope")

    def table_length(self, length: int) -> int:
        """The length of text whose tables one of ``length`` has: equal numbers, equal tables."""
        if not self.follows_length or length <= self.original_max_positions:
            return 0
        return length if self.kind == "dynamic" else self.original_max_positions + 1


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder must know about a model besides its weights.

    ``windows`` has one entry per layer: the number of positions a token attends to, itself included, or None for
    full causal attention. ``rope_of_layer`` has one as well: 0 for ``rope``, n for the n-th of ``other_ropes``; empty
    where all layers have ``rope``.

    ``qk_norm``: Q and K are normed, each head on its own or, for ``qk_norm_whole``, all heads as one. With
    ``qk_norm_apart`` each head has weights of its own. ``norms_before`` and ``norms_after``: what attention and MLP
    take is normed, and what they give. ``parallel``: attention and MLP take the same, normed once, and both are added.
    ``layer_norm``: every norm takes the mean off first. ``norm_offset`` is added to the weights of norms;
    ``rms_norm_eps`` is the epsilon of all. ``gated_mlp``: the activation of one half multiplies the other.

    ``score_scale`` multiplies Q·Kᵀ, 1/√head_dim for None. ``embedding_multiplier`` and ``logits_multiplier`` multiply
    what the embedding and the head give; the former rounded to the compute dtype for ``rounded_multiplier``. A soft cap
    c makes c·tanh(x/c) of x: ``score_cap`` of scores, once they are scaled, ``logits_cap`` of logits.
    """

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    other_ropes: tuple[RopeConfig, ...] = ()
    rope_of_layer: tuple[int, ...] = ()
    qk_norm_whole: bool = False
    qk_norm_apart: bool = False
    norms_before: bool = True
    norms_after: bool = False
    parallel: bool = False
    layer_norm: bool = False
    norm_offset: float = 0.0
    activation: Activation = "silu"
    gated_mlp: bool = True
    score_scale: float | None = None
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    rounded_multiplier: bool = False
    score_cap: float | None = None
    logits_cap: float | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """All rotary embeddings that layers have."""
        return (self.rope, *self.other_ropes)

    def rope_index(self, layer: int) -> int:
        """Which of ``ropes`` a layer has."""
        return self.rope_of_layer[layer] if self.rope_of_layer else 0

    @property
    def attention_scale(self) -> float:
        """What multiplies Q·Kᵀ."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def plain_block(self) -> bool:
        """Whether a layer is Llama's: norms before, SiLU of one half times the other, Q and K as they come, no caps."""
        gated_silu = self.activation == "silu" and self.gated_mlp
        norms = self.norms_before and not (self.norms_after or self.qk_norm or self.layer_norm or self.parallel)
        return gated_silu and norms and self.score_cap is None and self.logits_cap is None
