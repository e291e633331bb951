"""The products of the float and int8 paths: from a call and its payloads to the bytes of its product.

A product depends on the call, the payloads and the weights alone, except at the ``layer`` partition: there it also
depends on the connection's ``LayerState``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F

from tsqp.errors import ProtocolError
from tsqp.model.attention import score_product, value_product
from tsqp.model.linear import prepared
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend, Place, Run
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.layers import LayerState
from tsqp.untrusted.paths.prepared import Prepared
from tsqp.wire.channel import MAX_FRAME_BYTES
from tsqp.wire.device_memory import Payload
from tsqp.wire.messages import (
    AttentionScores,
    AttentionValues,
    Begin,
    Call,
    Embed,
    Finish,
    Layer,
    Linear,
    MultiplyPads,
    Product,
)
from tsqp.wire.payload import WireFormat, bytes_tensor, tensor_bytes

AnyPayload = TypeVar("AnyPayload", bound=Payload)


class Operators:
    """Computes the calls of one connection; float payloads are in the ``wire`` format both ways.

    ``backend`` is that of the device which the weights are on: its ``submit`` or ``settle`` ends a call.
    """

    def __init__(self, weights: ModelWeights, wire: WireFormat, backend: Backend | None = None) -> None:
        self._weights = weights
        self._wire = wire
        self._backend = backend or CpuBackend()
        self.prepared = Prepared()

    @cached_property
    def _layers(self) -> LayerState:
        """What this connection keeps here at the ``layer`` partition; nothing at the others."""
        return LayerState(self._weights, self._backend)

    @property
    def keeps_state(self) -> bool:
        """Whether this connection has anything here that outlives a call."""
        return "_layers" in self.__dict__

    def __call__(
        self, call: Call, payloads: Sequence[Payload], out: Payload | None = None, place: bytes = b""
    ) -> Payload | None:
        """The product of one call, in ``out`` where that is given; None for a call without a product.

        ``place`` is that of ``Arrival``. Raises ProtocolError for a call that does not fit the model, its payloads or
        the room for its product.
        """
        if out is not None and self.prepared.run(call, place):
            return out
        match call:
            case Linear():
                product = self._linear(call, payloads, out, place)
            case Embed():
                product = self._embed(call, payloads)
            case AttentionScores():
                product = self._scores(call, payloads, out)
            case AttentionValues():
                product = self._mix(call, payloads, out)
            case Begin():
                (payload,) = exactly(1, payloads)
                rows = sum(place.rows for place in call.places)
                self._layers.begin(call, self._tokens(payload, rows))
                return None
            case Layer():
                self._layers.layer(call)
                return None
            case Finish():
                self._place(None, (self._layers.rows_of(call), self._weights.config.vocab_size))  # its size, first
                product = self._layers.finish(call)
            case Product() | MultiplyPads():
                raise ProtocolError("products mod p are of the field path, and this connection asked for another")
        return self._backend.floats_out(product, self._wire, out)

    def _linear(self, call: Linear, payloads: Sequence[Payload], out: Payload | None, place: bytes) -> torch.Tensor:
        (payload,) = exactly(1, payloads)
        weights = self._weights.groups.get((call.group, call.layer))
        if weights is None:
            raise ProtocolError(f"there is no group {call.group} in layer {call.layer}")
        if call.part is not None and call.part >= len(weights.group.parts):
            raise ProtocolError(f"group {call.group} has no part {call.part}")
        first, end = weights.group.part_rows(call.part)
        inner, columns, dtype = weights.group.in_features, end - first, self._weights.dtype
        x = self._floats(payload, (call.rows, inner))
        y = self._place(out, (call.rows, columns))
        if out is not None and dtype == self._wire.dtype and self.prepared.wants(call, place):
            key = (self._weights.compute, call.group, call.layer, call.part)
            source, target = Place(payload, dtype, (call.rows, inner)), Place(out, dtype, (call.rows, columns))

            def bind(x: torch.Tensor, y: torch.Tensor) -> Run:
                return prepared(weights, x, call.part, y)

            self.prepared.keep(call, place, self._backend.prepare(key, source, target, bind))
        return weights.product(x, call.part, out=y)

    def _embed(self, call: Embed, payloads: Sequence[Payload]) -> torch.Tensor:
        (payload,) = exactly(1, payloads)
        check_frame(self._wire.size((call.rows, self._weights.config.hidden_size)))
        tokens = tensor_bytes(self._tokens(payload, call.rows))
        return F.embedding(self._backend.stage_in(tokens, torch.int32, (call.rows,)), self._weights.embedding)

    def _tokens(self, payload: Payload, rows: int) -> torch.Tensor:
        """int32 token ids (rows,), all of the vocabulary: a copy, since a client can change what was looked at.

        On a GPU an index that is out of bounds would end the whole process's use of the device.
        """
        tokens = bytes_tensor(self._backend.host_copy(payload), torch.int32, (rows,)).clone()
        numbers = tokens.numpy()
        if numbers.min() < 0 or numbers.max() >= self._weights.config.vocab_size:
            raise ProtocolError("a token id is outside of the vocabulary")
        return tokens

    def _scores(self, call: AttentionScores, payloads: Sequence[Payload], out: Payload | None) -> torch.Tensor:
        q, k = exactly(2, payloads)
        config = self._weights.config
        return score_product(
            self._floats(q, (config.num_heads, call.rows, config.head_dim)),
            self._floats(k, (config.num_kv_heads, call.keys, config.head_dim)),
            out=self._place(out, (config.num_heads, call.rows, call.keys)),
        )

    def _mix(self, call: AttentionValues, payloads: Sequence[Payload], out: Payload | None) -> torch.Tensor:
        p, v = exactly(2, payloads)
        config = self._weights.config
        return value_product(
            self._floats(p, (config.num_heads, call.rows, call.keys)),
            self._floats(v, (config.num_kv_heads, call.keys, config.head_dim)),
            out=self._place(out, (config.num_heads, call.rows, config.head_dim)),
        )

    def _floats(self, payload: Payload, shape: tuple[int, ...]) -> torch.Tensor:
        return self._backend.floats_in(payload, self._wire, shape, self._weights.dtype)

    def _place(self, out: Payload | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Where a product can be computed in place; None where it must be computed elsewhere and copied.

        Raises ProtocolError for a product that no reply can carry, before it is computed.
        """
        check_frame(self._wire.size(shape))
        if self._weights.dtype != self._wire.dtype:
            return None
        return self._backend.place(out, self._weights.dtype, shape)


def exactly(count: int, payloads: Sequence[AnyPayload]) -> Sequence[AnyPayload]:
    """The payloads, of which there are ``count``. Raises ProtocolError."""
    if len(payloads) != count:
        raise ProtocolError(f"{len(payloads)} payloads where {count} were expected")
    return payloads


def check_frame(size: int) -> None:
    """Raises ProtocolError for a product of more bytes than a reply can carry."""
    if size > MAX_FRAME_BYTES:
        raise ProtocolError(f"a product of {size} bytes; the limit is {MAX_FRAME_BYTES}: use smaller chunks")
