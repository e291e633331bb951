"""Audit this first: everything that touches a pad, a check vector or an unchecked reply. See ``docs/audit.md``."""
