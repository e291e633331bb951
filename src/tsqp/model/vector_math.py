"""The first call of what torch leaves to oneMKL's vector mathematics."""

from __future__ import annotations

import torch

FUNCTIONS = torch.cos, torch.sin, torch.tanh  # of float32 on the CPU: those that a forward pass calls


def settle() -> None:
    """Call each of ``FUNCTIONS`` with one number, so that no pass is the first of this process.

    In the first call oneMKL looks for the kernel of this processor. Where several threads of torch do so at once, one
    of them may compute its part with a kernel of low accuracy: the same input then gives other numbers than in every
    later call (https://github.com/pytorch/pytorch/issues/188792). One number takes one thread.
    """
    for function in FUNCTIONS:
        function(torch.zeros(1))
