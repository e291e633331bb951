"""What the Makefile runs beside the package: the lock, the figure of coverage."""
