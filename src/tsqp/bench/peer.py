"""What is measured beside ours: the same weights unsplit, in Hugging Face transformers, in this process."""

from __future__ import annotations

import importlib.util
import time
from importlib.metadata import version
from inspect import signature
from typing import Any, Protocol

import torch

from tsqp.api.llm import LLM
from tsqp.bench.ceilings import synchronize
from tsqp.bench.names import PEER_PACKAGES, PeerName
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.hf_config import hf_config_of
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.errors import CorruptCheckpoint, OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams


def choose_peer(name: PeerName | None) -> PeerName:
    """The peer asked for; transformers where it is installed when nothing was. Raises OptionError."""
    needed = PEER_PACKAGES.get(name or "transformers")
    installed = needed is None or importlib.util.find_spec(needed) is not None
    if name is not None and not installed:
        raise OptionError(f"--peer {name} needs {needed}: pip install 'tsqp[bench]'")
    return name or ("transformers" if installed else "none")


class Peer(Protocol):
    """Something else that runs the same model."""

    name: str

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """Seconds of one pass over the prompt, and of ``steps`` tokens one at a time after it."""


class Ours:
    """This package itself."""

    name = "TSQP linear, bfloat16"  # as a peer

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run."""
        stats = self._llm.stats
        stats.reset()
        self._llm.generate(tokens, SamplingParams(max_tokens=steps + 1, ignore_eos=True))
        return stats.prefill_s, stats.decode_s


class TransformersPeer:
    """A causal language model of transformers with a checkpoint's weights."""

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.name = f"transformers {version('transformers')}"
        self._device = torch.device(device)
        checkpoint = open_checkpoint(model)
        fields = hf_config_of(checkpoint.config, "float32")
        del fields["torch_dtype"]
        models: Any = AutoModelForCausalLM
        theirs = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            peer = models.from_config(theirs, dtype=dtype)
        weights = {name: checkpoint.tensor(name).to(self._device, dtype) for name in tensor_shapes(checkpoint.config)}
        peer.load_state_dict(weights, strict=False, assign=True)
        peer.tie_weights()
        # Built on the meta device, its frequency table has no values yet.
        peer.model.rotary_emb = type(peer.model.rotary_emb)(theirs).to(self._device)
        left = [name for name, parameter in peer.named_parameters() if parameter.is_meta]
        if left:
            raise CorruptCheckpoint(f"the peer lacks weights: {left[0]}")
        self._model: Any = peer.eval()
        # What transformers calls the KV cache, in the arguments and in the answer: renamed in 5.24.
        self._cache = "cache" if "cache" in signature(peer.forward).parameters else "past_key_values"

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run."""
        return self.run_together([tokens], steps)

    def run_together(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        """Seconds of one pass over prompts of one length, and of ``steps`` tokens of each after it, as one batch."""
        with torch.inference_mode():
            prompt = torch.tensor(prompts, device=self._device)
            synchronize(self._device)
            start = time.perf_counter()
            out = self._model(prompt, use_cache=True, logits_to_keep=1)
            token = self._choose(out)
            prefilled = time.perf_counter()
            for _ in range(steps):
                out = self._model(token, **{self._cache: out[self._cache]}, use_cache=True)
                token = self._choose(out)
            return prefilled - start, time.perf_counter() - prefilled

    def _choose(self, out: Any) -> torch.Tensor:
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronize(self._device)
        return token  # type: ignore[no-any-return]
