"""Names for what the time of a forward pass is spent on, and who may count it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, get_args

CallKind = Literal["embedding", "linear", "matmul", "layer", "lm_head"]
CALL_KINDS: tuple[CallKind, ...] = get_args(CallKind)
LayerOperator = Literal["rms_norm", "rotary", "softmax", "silu"]
AdapterOperator = Literal["lora"]  # of rows with an adapter alone
GuardOperator = Literal["mask", "pads", "check"]  # of the private modes alone
OperatorKind = LayerOperator | AdapterOperator | GuardOperator
OPERATOR_KINDS: tuple[OperatorKind, ...] = get_args(LayerOperator)


class Meter(Protocol):
    """Counts time; the layer mathematics tell it what they are doing."""

    def operator(self, kind: OperatorKind) -> AbstractContextManager[None]:
        """Around one element-wise operator, or attention."""

    def product(self, kind: CallKind) -> AbstractContextManager[None]:
        """Around one product that is computed in this process."""


class Unmetered:
    """Counts nothing."""

    def operator(self, kind: OperatorKind) -> AbstractContextManager[None]:
        return nullcontext()

    def product(self, kind: CallKind) -> AbstractContextManager[None]:
        return nullcontext()
