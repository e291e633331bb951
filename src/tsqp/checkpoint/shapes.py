"""Which tensors a model of a given shape consists of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tsqp.config.groups import LAYER_GROUPS, linear_groups, part_tensor
from tsqp.config.model import ModelConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
MAX_LAYERS = 1024  # the largest models have some 130; a damaged number must not keep anyone busy


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by its Hugging Face name, matrices as (out, in); no LM head when it is tied."""
    hidden = (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size), FINAL_NORM: hidden}
    if not config.tied_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    groups = [linear_groups(config)[name] for name in LAYER_GROUPS]
    q_norm, k_norm = _head_norms(config)
    for layer in range(config.num_layers):
        for key, name in norm_names(config, layer).items():
            shapes[name] = {"q": q_norm, "k": k_norm}.get(key, hidden)
        for group in groups:
            for part, rows in group.parts:
                shapes[part_tensor(layer, part, "weight")] = (rows, group.in_features)
                if group.bias:
                    shapes[part_tensor(layer, part, "bias")] = (rows,)
    return shapes


def _head_norms(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the norms of Q and of K."""
    if config.qk_norm_whole:
        return (config.q_size,), (config.kv_size,)
    if config.qk_norm_apart:
        return (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    return (config.head_dim,), (config.head_dim,)


def norm_names(config: ModelConfig, layer: int) -> dict[str, str]:
    """The norm weights that a layer has, by what they are for (``LayerNorms``): their Hugging Face names.

    ``post_attention_layernorm`` is Llama's name for the norm before the MLP, and where what attention gives is normed
    it is the name of that.
    """
    names: dict[str, str] = {}
    if config.norms_before:
        names["attention"] = "input_layernorm"
    if config.norms_before and not config.parallel:
        names["mlp"] = "pre_feedforward_layernorm" if config.norms_after else "post_attention_layernorm"
    if config.qk_norm:
        names |= {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
    if config.norms_after:
        names |= {"attention_after": "post_attention_layernorm", "mlp_after": "post_feedforward_layernorm"}
    return {key: f"model.layers.{layer}.{name}.weight" for key, name in names.items()}


def check_layers(count: int, where: str) -> int:
    """The number of layers. Raises UnsupportedModel when it is beyond reason."""
    if count > MAX_LAYERS:
        raise UnsupportedModel(f"{where}: {count} layers are not implemented; at most {MAX_LAYERS} are")
    return count


def check_stored_shapes(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], ignored: Collection[str], where: str
) -> None:
    """Hold what a file stores against what the config asks for, tensor by tensor.

    A tensor too many is refused as well: whoever stored it meant it to take part in the computation.

    Raises CorruptCheckpoint for a missing tensor or another shape, UnsupportedModel for an unknown tensor.
    """
    for name, shape in expected.items():
        if name not in stored:
            raise CorruptCheckpoint(f"{where}: the tensor {name} is missing")
        if stored[name] != shape:
            raise CorruptCheckpoint(f"{where}: {name} has shape {stored[name]}, its configuration asks for {shape}")
    unknown = sorted(stored.keys() - expected.keys() - set(ignored))
    if unknown:
        raise UnsupportedModel(f"{where}: the tensor {unknown[0]} has no place in a model of this architecture")
