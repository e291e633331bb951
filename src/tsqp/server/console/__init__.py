"""The page of ``tsqp serve --console``, and what it asks for. ``docs/console.md`` is the design."""
