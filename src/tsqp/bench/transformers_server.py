"""``python -m tsqp.bench.transformers_server MODEL DTYPE DEVICE THREADS``: transformers for ``--peer transformers``.

It writes ``{"name": "..."}`` when the model is there. Each line that it reads, ``{"prompts": [[1, 2]], "steps": 3}``,
gets one line, ``{"prefill_s": 0.2, "decode_s": 0.1}``. What fails is ``{"error": "..."}`` and the last line. It ends
when standard input does.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch

from tsqp.bench.ceilings import synchronize
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.hf_config import hf_config_of
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.errors import CorruptCheckpoint

# Threads that wait for work spin at first: for 9 ms in GNU's OpenMP, for 200 ms in LLVM's. What is measured after an
# answer has the cores to itself.
REST_S = 0.5


class TransformersModel:
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


def main() -> None:
    """Load the model, say so, answer until standard input ends."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads: whoever asked is gone
    place, dtype, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        model = TransformersModel(place, getattr(torch, dtype), device)
        _say(name=model.name)
        for line in sys.stdin.buffer:
            prefill_s, decode_s = model.run_together(**json.loads(line))
            time.sleep(REST_S)
            _say(prefill_s=prefill_s, decode_s=decode_s)
    except Exception as error:  # whatever it is, whoever asked says it in one line
        _say(error=" ".join(f"{type(error).__name__}: {error}".split()))


def _say(**answer: str | float) -> None:
    print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
