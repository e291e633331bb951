"""Numeric paths of a worker: floats, int8, and exact integers mod p."""
