"""``python -m tsqp.untrusted.front``: hands out the roster in a file, which is read again when it has changed.

Writes one line of JSON to standard output when it listens, ``{"address": "..."}``; logs go to standard error. Whoever
places workers replaces the file atomically (``os.replace``). Of a file that is gone, or is no roster any more, the log
has one line, and the last good roster goes on being handed out.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from contextlib import closing
from pathlib import Path

from tsqp.errors import InputError, OptionError, RosterError, TsqpError
from tsqp.untrusted.__main__ import EXIT_FAILED, EXIT_USAGE, worker_keys
from tsqp.wire.roster import read_roster
from tsqp.wire.transport.address import parse_address
from tsqp.wire.transport.front import Front, read_document

log = logging.getLogger("tsqp.front")

_Stamp = tuple[int, int, int, int]  # device, inode, time and size: one of them differs once a file was replaced


class RosterFile:
    """The roster in a file. Raises RosterError where there is none at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fault: str | None = None
        self._stamp: _Stamp | None = None
        self._document = b""
        self._look()
        if self._fault is not None:
            raise RosterError(f"{path}: {self._fault}")

    def document(self) -> bytes:
        """The last good one."""
        self._look()
        return self._document

    def _look(self) -> None:
        try:
            state = self._path.stat()
            stamp = (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
            if stamp == self._stamp:
                return
            document = read_document(self._path)
            roster = read_roster(document)
        except (OSError, RosterError) as error:
            fault = str(error) if isinstance(error, RosterError) else f"cannot be read: {error.strerror}"
            if fault != self._fault:
                log.error("%s: %s; the roster before it is handed out", self._path, fault)
            self._fault = fault
            return
        self._stamp, self._document, self._fault = stamp, document, None
        log.info("%s: epoch %d, %d workers", self._path, roster.epoch, len(roster.workers))


def front_options(arguments: list[str]) -> argparse.Namespace:
    """Exits with a message for what it does not know, as argparse does."""
    about = "Hand out a roster of workers to trusted sides, until Ctrl-C."
    parser = argparse.ArgumentParser(prog="python -m tsqp.untrusted.front", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--listen", help="tcp://host:port; port 0: any", metavar="ADDR", required=True)
    add("--roster", help="the file with the roster", type=Path, metavar="FILE", required=True)
    add("--key", help="this front's secret CURVE key, for clients that know its public one", type=Path, metavar="FILE")
    add("--allow", help="public CURVE key of who may ask; may be given again", type=Path, action="append")
    add("--exit-with-stdin", help="stop at the end of standard input", action="store_true")
    return parser.parse_args(arguments)


def serve(options: argparse.Namespace) -> None:
    """Listen, announce, answer, until a signal or the end of standard input. Raises TsqpError."""
    address = parse_address(options.listen)
    if address.transport != "tcp":
        raise OptionError(f"{address}: a front listens on a tcp address")
    roster = RosterFile(options.roster)
    watched = sys.stdin.fileno() if options.exit_with_stdin else None
    with closing(Front.listen(address, worker_keys(options), watched)) as front:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: front.interrupt())
        print(json.dumps({"address": f"roster+{front.address}"}), flush=True)  # noqa: T201
        log.info("listening on %s", front.address)
        front.serve(roster.document)


def main(arguments: list[str] | None = None) -> int:
    """Run a front. Returns the exit code: 0 stopped, 1 failed, 2 wrong options."""
    logging.basicConfig(stream=sys.stderr, format="tsqp front: %(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        serve(front_options(sys.argv[1:] if arguments is None else arguments))
    except TsqpError as error:
        print(f"tsqp front: error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE if isinstance(error, InputError) else EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
