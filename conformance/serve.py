"""Starts what the clients are pointed at: ``tsqp serve`` of the tiny chat model of the tests, masked, with an API key.

    .venv/bin/python -m conformance.serve DIRECTORY

The first line that is printed has the key and the directory of the model, the second is the server's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.server.chat_model import chat_model

from tsqp.server.api_keys import add_line, line_for, new_key

NAME = "tiny/chat"  # with a slash, as the names of checkpoints have one


def main() -> None:
    """Makes the model and the key, and becomes the server."""
    keys, key = Path(sys.argv[1]) / "keys", new_key()
    add_line(keys, line_for("conformance", key))
    model = str(chat_model())
    sys.stdout.write(json.dumps({"key": key, "directory": model}) + "\n")
    sys.stdout.flush()
    options = ["--model", model, "--served-model-name", NAME, "--api-keys", str(keys), "--drain-s", "5"]
    server = [sys.executable, "-m", "tsqp", "serve", "--json", "--port", "0", "--metrics-port", "0", *options]
    os.execv(server[0], server)


if __name__ == "__main__":
    main()
