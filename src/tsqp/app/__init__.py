"""The trusted side's shell: the Python API, the command line, starting a worker."""
