"""Scripts that measure. Loops that they compile are kept on disk, as commands keep them.

That is asked for here, since it holds for modules imported afterwards, and most scripts import some themselves.
"""

from __future__ import annotations

from tsqp.api.kernel_cache import keep_loops
from tsqp.arith import jit
from tsqp.errors import PathRefused

if not jit.keeps_loops():  # tests keep theirs elsewhere
    try:
        keep_loops()
    except PathRefused as refused:
        raise SystemExit(f"benchmarks: {refused}") from None
