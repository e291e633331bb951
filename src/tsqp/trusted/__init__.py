"""The trusted side: sees plaintext and secrets. Never imports ``tsqp.untrusted``."""
