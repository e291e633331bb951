"""``python -m tsqp`` is the ``tsqp`` command."""

from tsqp.app.main import main

if __name__ == "__main__":
    main()
