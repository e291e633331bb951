"""``python -m tsqp.cluster.head DIRECTORY NODES``: a Ray of this machine alone, on loopback, until SIGTERM.

``ray start`` would take the machine's own address in place of 127.0.0.1, and then listen on all interfaces. Several
nodes are several machines to Ray: the loss of one can be rehearsed here.

Writes one line of JSON to standard output when Ray is there, ``{"address": "127.0.0.1:port"}``.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

LOOPBACK = "127.0.0.1"
NODE_CPUS = 4096.0  # what Ray counts, not what there is: how many workers fit is the user's choice
STORE_BYTES = 80_000_000  # of Ray's object store, which we do not use; Ray refuses less than 75 MiB


def main() -> int:
    """Start, announce, wait for a signal, end."""
    directory, nodes = sys.argv[1:]
    signals = (signal.SIGTERM, signal.SIGINT)
    from ray.cluster_utils import Cluster

    settings: dict[str, Any] = {
        "node_ip_address": LOOPBACK,
        "num_cpus": NODE_CPUS,
        "object_store_memory": STORE_BYTES,
    }
    head = {**settings, "temp_dir": directory, "include_dashboard": False, "num_gpus": None}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(int(nodes) - 1):
        cluster.add_node(**settings, temp_dir=directory)
    # After Ray, whose threads must not take them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print(json.dumps({"address": cluster.address}), flush=True)  # noqa: T201
    signal.sigwait(signals)
    cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
