"""On a user's machine: asks a server for evidence, and holds it against a policy. Loads no model and no torch."""
