"""The ways calls travel. The scheme of an address picks one; nothing falls back to another."""
