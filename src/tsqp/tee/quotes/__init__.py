"""Quotes of each kind: whether a maker's key signed one, and whether a policy accepts what it says of a guest."""
