"""The untrusted side: weights on a device, products on request. Never imports ``tsqp.trusted``."""
