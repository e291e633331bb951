"""The machine of the trusted side: which TEE it is, and what this process gives up to be harder to read."""
