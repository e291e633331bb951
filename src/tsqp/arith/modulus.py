"""The prime of the field, once. A Mersenne prime: 2³¹ ≡ 1, so that a reduction is a shift, a mask and an addition."""

from __future__ import annotations

P = 2**31 - 1
MAX_CENTRED = (P - 1) // 2
