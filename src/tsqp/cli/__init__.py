"""The ``tsqp`` command: commands, options, reports."""
