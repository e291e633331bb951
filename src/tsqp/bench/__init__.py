"""Benchmarks: each measures one thing beside a peer and the machine's own limit. ``tsqp bench KIND``."""
