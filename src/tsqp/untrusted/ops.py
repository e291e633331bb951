"""The products a worker computes: one pure function from a call and its payloads to the product's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tsqp.errors import ProtocolError
from tsqp.model.attention import score_product, value_product
from tsqp.model.payload import bytes_tensor, tensor_bytes
from tsqp.untrusted.weights import WorkerWeights
from tsqp.wire.messages import Call, Embed, Linear, Mix, Scores


class Operators:
    """Computes calls with one set of weights; float payloads are of ``wire_dtype`` both ways."""

    def __init__(self, weights: WorkerWeights, wire_dtype: torch.dtype) -> None:
        self._weights = weights
        self._wire_dtype = wire_dtype

    def __call__(self, call: Call, payloads: Sequence[memoryview]) -> memoryview:
        """The product of one call. Raises ProtocolError for a call that does not fit the model or its payloads."""
        with torch.inference_mode():
            match call:
                case Linear():
                    product = self._linear(call, payloads)
                case Embed():
                    product = self._embed(call, payloads)
                case Scores():
                    product = self._scores(call, payloads)
                case Mix():
                    product = self._mix(call, payloads)
            return tensor_bytes(product.to("cpu", self._wire_dtype).contiguous())

    def _linear(self, call: Linear, payloads: Sequence[memoryview]) -> torch.Tensor:
        (payload,) = _exactly(1, payloads)
        weights = self._weights.groups.get((call.group, call.layer))
        if weights is None:
            raise ProtocolError(f"there is no group {call.group} in layer {call.layer}")
        if call.part is not None and call.part >= len(weights.group.parts):
            raise ProtocolError(f"group {call.group} has no part {call.part}")
        return weights.product(self._floats(payload, (call.rows, weights.group.in_features)), call.part)

    def _embed(self, call: Embed, payloads: Sequence[memoryview]) -> torch.Tensor:
        (payload,) = _exactly(1, payloads)
        tokens = bytes_tensor(payload, torch.int32, (call.rows,))
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._weights.spec.vocab_size:
            raise ProtocolError("a token id is outside of the vocabulary")
        return F.embedding(tokens.to(self._weights.device), self._weights.embedding)

    def _scores(self, call: Scores, payloads: Sequence[memoryview]) -> torch.Tensor:
        q, k = _exactly(2, payloads)
        spec = self._weights.spec
        return score_product(
            self._floats(q, (spec.num_heads, call.rows, spec.head_dim)),
            self._floats(k, (spec.num_kv_heads, call.keys, spec.head_dim)),
        )

    def _mix(self, call: Mix, payloads: Sequence[memoryview]) -> torch.Tensor:
        p, v = _exactly(2, payloads)
        spec = self._weights.spec
        return value_product(
            self._floats(p, (spec.num_heads, call.rows, call.keys)),
            self._floats(v, (spec.num_kv_heads, call.keys, spec.head_dim)),
        )

    def _floats(self, payload: memoryview, shape: tuple[int, ...]) -> torch.Tensor:
        return bytes_tensor(payload, self._wire_dtype, shape).to(self._weights.device, self._weights.dtype)


def _exactly(count: int, payloads: Sequence[memoryview]) -> Sequence[memoryview]:
    if len(payloads) != count:
        raise ProtocolError(f"{len(payloads)} payloads where {count} were expected")
    return payloads
