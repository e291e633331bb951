"""Scripts that measure. Loops that they compile are kept on disk, as commands keep them.

That is asked for here, since it holds for modules imported afterwards, and most scripts import some themselves.
"""

from __future__ import annotations

import os

from tsqp.api.kernel_cache import keep_loops

if "NUMBA_CACHE_DIR" not in os.environ:  # tests keep theirs elsewhere
    keep_loops()
