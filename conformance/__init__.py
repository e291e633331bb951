"""Clients and tools that others made, against a real server: ``make conformance``. docs/testing.md says how."""
