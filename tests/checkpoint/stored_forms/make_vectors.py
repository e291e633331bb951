"""Makes ``vectors/``: tiny random checkpoints, quantised by each form's own library, and what it reads them as.

Run by hand, in an environment of its own; the tests need none of these libraries::

    pip install torch transformers accelerate
    pip install --no-deps compressed-tensors bitsandbytes auto-gptq==0.7.1
    pip install --no-deps --no-build-isolation autoawq==0.2.9
    python make_vectors.py

``expected.json`` has the dtype and the SHA-256 of each matrix as the library dequantises it. Zeros of GPTQ are at
least 1, because its library cannot store another.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VECTORS = Path(__file__).parent / "vectors"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
# On a CPU bitsandbytes is right only where a row has whole blocks of 64 numbers.
WIDE = SIZES | {"hidden_size": 64}
Stored = dict[str, torch.Tensor]  # the tensors of one module, by the rest of their names
Quantiser = Callable[[torch.Tensor], tuple[Stored, torch.Tensor]]  # and what they stand for


def tiny(dtype: torch.dtype, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    model.to(dtype)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.2).to(dtype)
    return model


def linears(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    return ((name, part) for name, part in model.model.named_modules(prefix="model") if type(part) is torch.nn.Linear)


def write(
    case: str, quantisation: dict[str, Any], dtype: torch.dtype, quantise: Quantiser, sizes: dict[str, Any] = SIZES
) -> None:
    """A checkpoint whose linear layers, but for the head, ``quantise`` made."""
    model = tiny(dtype, sizes)
    state = dict(model.state_dict())
    expected = {}
    for name, linear in linears(model):
        del state[f"{name}.weight"]
        stored, value = quantise(linear.weight.data)
        state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
        expected[f"{name}.weight"] = digest(value)
    directory = VECTORS / case
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", **sizes, "tie_word_embeddings": False, "quantization_config": quantisation}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    for file, content in (("config.json", config), ("expected.json", expected)):
        (directory / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(case, (directory / "model.safetensors").stat().st_size)  # noqa: T201


def digest(value: torch.Tensor) -> list[str]:
    data = value.detach().contiguous().flatten().view(torch.uint8).numpy()
    return [str(value.dtype).removeprefix("torch."), hashlib.sha256(data.tobytes()).hexdigest()]


def module_of(package: str, name: str) -> Any:
    """A module of a package whose own ``__init__`` would load all that the package depends on."""
    if package not in sys.modules:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        stub = types.ModuleType(package)
        stub.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = stub
    return importlib.import_module(f"{package}.{name}")


def compressed_tensors(case: str, form: str, dtype: torch.dtype, weights: dict[str, Any], **others: Any) -> None:
    quantization = importlib.import_module("compressed_tensors.quantization")
    lifecycle = importlib.import_module("compressed_tensors.quantization.lifecycle.initialize")
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    compressors = importlib.import_module("compressed_tensors.compressors")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=form, **others)

    def quantise(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        linear.weight.data = weight.clone()
        lifecycle.initialize_module_for_quantization(linear, scheme)
        args = scheme.weights
        down, across = {
            "tensor": (weight.shape[0], weight.shape[1]),
            "channel": (1, weight.shape[1]),
            "group": (1, args.group_size),
            "block": args.block_structure,
        }[args.strategy]
        blocks = weight.unflatten(0, (-1, down)).unflatten(2, (-1, across))
        lowest, highest = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
        scale, zero = utils.calculate_qparams(lowest, highest, args)
        linear.weight_scale.data = scale.reshape(linear.weight_scale.shape).to(linear.weight_scale.dtype)
        if hasattr(linear, "weight_zero_point"):
            linear.weight_zero_point.data = zero.reshape(linear.weight_scale.shape).to(linear.weight_zero_point.dtype)
        compressors.compress_module(linear)
        stored = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
        compressors.decompress_module(linear)
        return stored, linear.weight.data

    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    write(case, json.loads(config.model_dump_json()), dtype, quantise)


def bitsandbytes(case: str, kind: str, nested: bool, storage: torch.dtype, dtype: torch.dtype) -> None:
    library = importlib.import_module("bitsandbytes")

    def quantise(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        packed, state = library.functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}, library.functional.dequantize_4bit(packed, state)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    write(case, config, dtype, quantise, WIDE)


def llm_int8(case: str) -> None:
    library = importlib.import_module("bitsandbytes")

    def quantise(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        digits, largest, _ = library.functional.int8_vectorwise_quant(weight)
        stored = {"weight": digits, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return stored, library.functional.int8_vectorwise_dequant(digits, largest)

    write(case, {"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.float16, quantise)


def gptq(case: str, bits: int, group_size: int, *, shuffled: bool = False, v2: bool = False) -> None:
    library = module_of("auto_gptq", "nn_modules.qlinear.qlinear_cuda")

    def quantise(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        outputs, inputs = weight.shape
        size = inputs if group_size == -1 else group_size
        group_of = torch.arange(inputs) // size
        if shuffled:
            group_of = group_of[torch.randperm(inputs)]
        groups = inputs // size
        members = [weight[:, group_of == group].float() for group in range(groups)]
        lowest = torch.stack([part.amin(dim=1) for part in members], dim=1)
        highest = torch.stack([part.amax(dim=1) for part in members], dim=1)
        scales = ((highest - lowest) / (2**bits - 1)).clamp(min=1e-3)
        zeros = (-lowest / scales).round().clamp(1, 2**bits - 1)
        linear = torch.nn.Linear(inputs, outputs, bias=False)
        # What it stores has to fit into its bits: nothing in the library makes sure.
        digits = ((weight.float() + (zeros * scales)[:, group_of]) / scales[:, group_of]).round()
        digits = digits.clamp(0, 2**bits - 1)
        linear.weight.data = (digits - zeros[:, group_of]) * scales[:, group_of]
        layer = library.QuantLinear(bits, size, inputs, outputs, False, weight_dtype=torch.float16)
        layer.pack(linear, scales, zeros, group_of.int())
        layer.scales = layer.scales.half()
        value = layer(torch.eye(inputs, dtype=torch.float16)).t()
        stored = dict(layer.state_dict())
        if v2:  # whose zeros are stored as they are: one more in each field
            stored["qzeros"] = stored["qzeros"] + sum(1 << shift for shift in range(0, 32, bits))
        return stored, value

    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": shuffled, "sym": False}
    write(case, config | {"checkpoint_format": "gptq_v2" if v2 else "gptq"}, torch.float16, quantise)


def awq(case: str, group_size: int) -> None:
    gemm = module_of("awq", "modules.linear.gemm")
    packing = module_of("awq", "utils.packing_utils")

    def quantise(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        outputs, inputs = weight.shape
        groups = weight.float().unflatten(1, (-1, group_size))
        lowest, highest = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((highest - lowest) / 15).clamp(min=1e-3).half().float()
        zeros = (-lowest / scales).round().clamp(0, 15)
        digits = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        linear = torch.nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = ((digits - zeros[..., None]) * scales[..., None]).flatten(1)
        layer = gemm.WQLinear_GEMM.from_linear(linear, 4, group_size, False, scales.t(), zeros.t())
        value = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group_size).t()
        return dict(layer.state_dict()), value

    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    write(case, config, torch.float16, quantise)


def fp8(case: str, block: tuple[int, int]) -> None:
    """Quantised by its formula, and read by transformers, which has the only code in Python for it."""
    integration = importlib.import_module("transformers.integrations.finegrained_fp8")

    def quantise(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        blocks = weight.float().unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        digits = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape)
        value = integration.Fp8Dequantize(None)._dequantize_one(digits, scale, torch.bfloat16)
        return {"weight": digits, "weight_scale_inv": scale}, value

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    write(case, config, torch.bfloat16, quantise)


def main() -> None:
    half, brain = torch.float16, torch.bfloat16
    packed, group = "pack-quantized", {"strategy": "group", "group_size": 16}
    compressed_tensors("ct-int4", packed, brain, {"num_bits": 4, **group})
    compressed_tensors("ct-int4-zeros", packed, half, {"num_bits": 4, "symmetric": False, **group})
    compressed_tensors("ct-int8-channel", packed, brain, {"num_bits": 8, "symmetric": False, "strategy": "channel"})
    activations = {"num_bits": 8, "strategy": "token", "dynamic": True}
    rows = {"num_bits": 8, "strategy": "channel"}
    compressed_tensors("ct-w8a8", "int-quantized", brain, rows, input_activations=activations)
    floats = {"type": "float", "num_bits": 8}
    activations |= floats
    compressed_tensors("ct-fp8", "float-quantized", brain, floats | rows, input_activations=activations)
    blocks = floats | {"strategy": "block", "block_structure": [16, 32]}
    compressed_tensors("ct-fp8-blocks", "naive-quantized", brain, blocks)
    compressed_tensors("ct-fp8-tensor", "naive-quantized", half, floats | {"strategy": "tensor"})
    bitsandbytes("bnb-nf4", "nf4", False, torch.uint8, brain)
    bitsandbytes("bnb-nf4-nested", "nf4", True, torch.uint8, half)
    bitsandbytes("bnb-fp4-stored-as-bfloat16", "fp4", False, brain, brain)
    llm_int8("bnb-int8")
    for bits in (2, 3, 4, 8):
        gptq(f"gptq-{bits}-bit", bits, 16)
    gptq("gptq-shuffled", 4, 16, shuffled=True)
    gptq("gptq-one-group", 4, -1)
    gptq("gptq-v2", 4, 16, v2=True)
    awq("awq", 16)
    fp8("fp8-blocks", (16, 32))


if __name__ == "__main__":
    main()
