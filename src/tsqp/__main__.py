"""``python -m tsqp`` is the ``tsqp`` command."""

from tsqp.cli.main import main

if __name__ == "__main__":
    main()
