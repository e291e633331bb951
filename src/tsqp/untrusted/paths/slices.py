"""How a linear group is divided over devices: by its output features, in whole units of them."""

from __future__ import annotations

from typing import NamedTuple

from tsqp.config.groups import LinearGroup

UNIT = 128  # features: what the largest tile of a kernel has, and a multiple of what every library wants


class Slice(NamedTuple):
    """Output features ``first`` up to ``end`` of a group, which one device has."""

    first: int
    end: int


class Share(NamedTuple):
    """What a slice holds of a product: ``width`` columns from ``first`` on; none of them for a width of 0."""

    first: int
    width: int


def slices(features: int, devices: int) -> list[Slice]:
    """One slice for each of ``devices``, in order: none is empty, and they differ by one unit at most.

    What no unit divides is the last one's. Raises ValueError for more devices than features.
    """
    if not 1 <= devices <= features:
        raise ValueError(f"{features} output features cannot be divided over {devices} devices")
    unit = UNIT
    while features // unit < devices:
        unit //= 2
    units = features // unit
    bounds = [unit * (units * device // devices) for device in range(devices)]
    return [Slice(first, end) for first, end in zip(bounds, [*bounds[1:], features], strict=True)]


def share(group: LinearGroup, part: int | None, own: Slice) -> Share:
    """Which columns of the product by one part, or by the whole group for None, a slice has."""
    first, end = group.part_rows(part)
    begun = max(first, own.first)
    return Share(begun - first, max(0, min(end, own.end) - begun))
