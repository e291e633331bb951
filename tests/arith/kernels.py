"""The kernels of digits that this processor can be trusted with."""

from __future__ import annotations

import pytest
import torch

from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.many_rows import ManyRowsKernel
from tsqp.arith.product import BlockedKernel, OffsetKernel
from tsqp.arith.self_test import is_exact

CPU = torch.device("cpu")
SATURATES = pytest.mark.skipif(not is_exact(OffsetKernel(), CPU), reason="this processor's _int_mm saturates")
NO_VNNI = pytest.mark.skipif(not FewRowsKernel.supported(), reason="this processor has no vpdpbusd")
NO_AMX = pytest.mark.skipif(not ManyRowsKernel.supported(), reason="this processor has no AMX, or Linux forbids it")

KERNELS = [
    pytest.param(BlockedKernel(), id="blocked"),
    pytest.param(OffsetKernel(), id="offset", marks=SATURATES),
    pytest.param(FewRowsKernel(), id="few_rows", marks=[SATURATES, NO_VNNI]),
    pytest.param(ManyRowsKernel(), id="many_rows", marks=[SATURATES, NO_AMX]),
]
