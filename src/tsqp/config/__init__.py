"""Floor 1: what a run is made of. Frozen values, no I/O, no libraries."""
