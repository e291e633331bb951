"""What was read of a checkpoint, as one line for a person."""

from __future__ import annotations

from tsqp.checkpoint.base import Checkpoint


def read_line(checkpoint: Checkpoint, seconds: float) -> str:
    """``read 2 files of 4.92 GB in 12.3 s; stored as: 193 Q4_K, 65 F32, 33 Q6_K``, the numbers of tensors."""
    forms = ", ".join(f"{count} {form}" for form, count in checkpoint.stored_as().items())
    return f"read {files_text(checkpoint)} in {seconds:.1f} s{f'; stored as: {forms}' if forms else ''}"


def files_text(checkpoint: Checkpoint) -> str:
    """``1 file of 0.27 GB``; ``no file`` for weights that are made when they are used."""
    sizes = [path.stat().st_size for path in checkpoint.files()]
    return f"{len(sizes)} file{'s'[: len(sizes) != 1]} of {sum(sizes) / 1e9:.2f} GB" if sizes else "no file"
