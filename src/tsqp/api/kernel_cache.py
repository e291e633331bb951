"""Whether compiled kernels are kept on disk, and where. They are code that the trusted side loads."""

from __future__ import annotations

import os
from pathlib import Path

from tsqp.checkpoint.cache import cache_directory, code_directory
from tsqp.errors import PathRefused
from tsqp.private_path import private_directory
from tsqp.tee.detection import detect_tee

AUTO, OFF = "auto", "off"
_KERNELS = "kernels"  # below the cache directory


def keeps_none(choice: str) -> bool:
    """Whether no compiled kernel is kept so far, as before the first start. Looks at the disk, and loads nothing."""
    place = cache_directory() / _KERNELS if choice == AUTO else Path(choice)
    return choice != OFF and not os.path.lexists(place)  # also where it cannot be entered


def keep_loops(choice: str | None = None) -> None:
    """Have loops kept where ``kernel_cache_directory`` says: those of modules that are imported afterwards.

    For whatever imports some before ``LLM``, which does so itself. None: as TSQP_KERNEL_CACHE says. Raises PathRefused.
    """
    directory = kernel_cache_directory(choice or os.environ.get("TSQP_KERNEL_CACHE") or AUTO)
    if directory is not None:
        from tsqp.arith.jit import enable_cache

        enable_cache(directory)


def kernel_cache_directory(choice: str) -> Path | None:
    """The directory for compiled kernels, made with mode 0700 when missing; None for none.

    ``auto``: in the user's cache directory, and none in a TEE, whose disk the host can write. ``off``: none. Anything
    else is a directory that the user vouches for. Raises PathRefused where others could write.
    """
    if choice == OFF or (choice == AUTO and detect_tee() is not None):
        return None
    from tsqp.arith.jit import cache_name  # pulls in numba

    if choice == AUTO:
        return code_directory(_KERNELS, cache_name())
    try:
        return private_directory(Path(choice) / cache_name(), "choose another compute.kernel_cache, or off")
    except PathRefused as refused:
        fields = ("compute.kernel_cache",)
        raise PathRefused(refused.path, refused.problem, refused.remedy, unsafe=refused.unsafe, fields=fields) from None
