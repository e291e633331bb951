"""The number formats a run can be asked for, by the names that cross the wire."""

from __future__ import annotations

from typing import Literal, get_args

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
ITEM_BYTES: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
