"""Devices that a worker computes on."""
