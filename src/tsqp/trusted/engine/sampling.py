"""From logits to the next token. The sampler, its seed and its choices never leave the trusted side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tsqp.trusted.engine.sampling_params import SamplingParams


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> int:
        """The next token from logits (vocab_size,), float32; ``text`` holds every token so far."""
        params = self._params
        if params.repetition_penalty != 1.0:
            logits = penalised(logits, text, params.repetition_penalty)
        if params.temperature == 0.0:
            return int(logits.argmax())
        probabilities = torch.softmax(narrowed(tempered(logits, params.temperature), params), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits divided by a temperature above 0, the largest of them at 0 so that none overflows."""
    # Below the smallest normal float32 all of the probability is on the maximum anyway.
    return (logits - logits.max()) / max(temperature, torch.finfo(torch.float32).tiny)


def penalised(logits: torch.Tensor, text: Sequence[int], penalty: float) -> torch.Tensor:
    """Logits with those of the tokens in ``text`` made less likely."""
    seen = torch.tensor(sorted(set(text)), dtype=torch.int64)
    scores = logits[seen]
    largest = torch.finfo(logits.dtype).max
    penalised_logits = logits.clone()
    penalised_logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty).clamp(-largest, largest)
    return penalised_logits


def narrowed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits with all but the choices that top-k, top-p and min-p allow at minus infinity."""
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        # A token stays while the mass before it is below top_p, so the first one always stays.
        outside = probabilities.cumsum(-1) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -math.inf)
    if params.min_p > 0.0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return logits
