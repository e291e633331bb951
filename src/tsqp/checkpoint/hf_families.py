"""What sets the families apart, in transformers' terms: a row of a table each.

A family that needs more than a row is not on the same block, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tsqp.config.model import Architecture


@dataclass(frozen=True)
class Family:
    """What transformers assumes for an absent key (None: derived from other keys), and what no key says.

    ``biases``: which linear layers have some; ``attention``: Q, K, V and the output if ``attention_bias``, ``mlp``:
    these, and the MLP if ``mlp_bias``, ``apart``: the output by ``attention_out_bias``. ``windows``: of no layer, of
    all, of those that ``layer_types`` lists, or as Qwen has it (by number of the layer). ``pattern``: where no types
    are listed, each layer whose number is a multiple of it has no window. ``fixed`` are fields of a ModelConfig.

    ``partial_rotary``: whether a part of each head may be rotated. ``original_positions``: the original context where
    the file does not say. ``renamed_ropes``: rope types under earlier names. ``skips_rope``: some layers have no rotary
    embedding. ``unrotated_full``: those without a window have none. ``local_theta``: those with a window have one of
    their own, with this base. ``fused``: Q, K, V are one tensor, and so are gate and up. ``neighbours``: numbers 2i and
    2i + 1 of a head are rotated together.

    ``multipliers``: Granite's. ``gemma``: its multipliers and soft caps. ``cohere``: its multiplier and norms.
    ``refused``: keys that change the computation.
    """

    causal_lm: str
    max_positions: int
    num_heads: int | None = None
    vocab_size: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rms_norm_eps: float = 1e-6
    theta: float = 10_000.0
    tied: bool = False
    activation: str = "silu"
    biases: Literal["none", "qkv", "attention", "mlp", "apart"] = "mlp"
    attention_bias: bool = False
    windows: Literal["none", "all", "listed", "qwen"] = "none"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary: bool = False
    original_positions: int | None = None
    renamed_ropes: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False
    neighbours: bool = False
    skips_rope: bool = False
    multipliers: bool = False
    activation_key: str = "hidden_act"
    epsilon_key: str = "rms_norm_eps"
    pattern: int | None = None
    unrotated_full: bool = False
    local_theta: float | None = None
    score_cap: float | None = None
    logits_cap: float | None = None
    gemma: bool = False
    cohere: bool = False
    refused: tuple[str, ...] = ()

    @property
    def written(self) -> bool:
        """Whether ``hf_config_of`` writes it: keys and tensors are Llama's, or as the row says."""
        own = self.fused or self.neighbours or self.skips_rope or self.multipliers or self.gemma
        return not own and self.windows != "listed" and self.biases != "apart"


_GEMMA: dict[str, Any] = {
    "num_kv_heads": 4,
    "head_dim": 256,
    "window": 4096,
    "tied": True,
    "activation": "gelu_pytorch_tanh",
    "activation_key": "hidden_activation",
    "biases": "attention",
    "windows": "listed",
    "gemma": True,
}
_COHERE: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "epsilon_key": "layer_norm_eps",
    "tied": True,
    "biases": "attention",
    "neighbours": True,
    "cohere": True,
    "fixed": {"parallel": True, "layer_norm": True},
}

FAMILIES: dict[Architecture, Family] = {
    "llama": Family("LlamaForCausalLM", 2048),
    "mistral": Family("MistralForCausalLM", 131_072, num_kv_heads=8, window=4096, biases="none", windows="all"),
    "ministral": Family("MinistralForCausalLM", 131_072, num_kv_heads=8, window=4096, biases="none", windows="listed"),
    "qwen2": Family("Qwen2ForCausalLM", 32_768, num_kv_heads=32, window=4096, biases="qkv", windows="qwen"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        32_768,
        num_kv_heads=32,
        head_dim=128,
        window=4096,
        biases="attention",
        windows="qwen",
        fixed={"qk_norm": True},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        32_768,
        num_kv_heads=4,
        theta=2_000_000.0,
        tied=True,
        windows="listed",
        skips_rope=True,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM", 524_288, num_kv_heads=8, head_dim=128, biases="apart", attention_bias=True
    ),
    "arcee": Family(
        "ArceeForCausalLM",
        4096,
        rms_norm_eps=1e-5,
        activation="relu2",
        fixed={"activation": "relu2", "gated_mlp": False},
    ),
    "helium": Family(
        "HeliumForCausalLM",
        4096,
        num_kv_heads=20,
        head_dim=128,
        rms_norm_eps=1e-8,
        theta=100_000.0,
        neighbours=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        4096,
        rms_norm_eps=1e-5,
        biases="none",
        windows="all",
        partial_rotary=True,
        original_positions=4096,
        renamed_ropes={"su": "longrope", "yarn": "longrope"},
        fused=True,
    ),
    "granite": Family("GraniteForCausalLM", 2048, multipliers=True),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        2048,
        rms_norm_eps=1e-5,
        biases="attention",
        fixed={"qk_norm": True, "qk_norm_whole": True, "norms_before": False, "norms_after": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        8192,
        pattern=2,
        score_cap=50.0,
        logits_cap=30.0,
        fixed={"norms_after": True, "norm_offset": 1.0, "activation": "gelu_tanh"},
        refused=("use_bidirectional_attention",),
        **_GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        131_072,
        num_heads=8,
        vocab_size=262_208,
        theta=1_000_000.0,
        pattern=6,
        local_theta=10_000.0,
        fixed={"qk_norm": True, "norms_after": True, "norm_offset": 1.0, "activation": "gelu_tanh"},
        refused=("attn_logit_softcapping", "use_bidirectional_attention"),
        **_GEMMA,
    ),
    "cohere": Family("CohereForCausalLM", 8192, theta=500_000.0, **_COHERE),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        8192,
        window=4096,
        windows="listed",
        pattern=4,
        unrotated_full=True,
        refused=("use_qk_norm",),
        **_COHERE,
    ),
}

# Models of text and more, of which the part for text is a model of another type: the type of each.
TEXT_PARTS: dict[str, Architecture] = {"gemma3": "gemma3_text"}
