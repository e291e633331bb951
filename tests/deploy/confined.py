"""The command line of a unit under what of its restrictions can be had without systemd as the first process.

A mount namespace: the root is read-only, ``/tmp`` is private, homes are hidden, the unit's own directories are its
user's. No network where the unit has none. Its user, no capability, no new privilege, no core dump. Not applied:
filters of system calls, and what systemd does by control groups.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tsqp
from tests.deploy.unit_files import COMMAND, arguments_of, settings_of

USERS = {"tsqp": 61_001, "tsqp-worker": 61_002}
SPECIFIERS = {"%S": "/var/lib", "%C": "/var/cache", "%t": "/run"}
TOOLS = ("unshare", "setpriv", "prlimit", "mount")

# What the other users need of this installation, which may lie in a home, is put below /opt.
PREPARE = """
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
over() { mount -t tmpfs -o "$2" tmpfs "$1"; }
held=$(mktemp -d); mount --bind "$PLACES" "$held"
over /opt mode=755
mkdir -p /opt/python /opt/site /opt/src /opt/tsqp/bin
mount --bind "$PYTHON" /opt/python; mount --bind "$SITE" /opt/site; mount --bind "$SOURCE" /opt/src
[ -z "$MORE_SITE" ] || { mkdir /opt/more; mount --bind "$MORE_SITE" /opt/more; }
printf '#!/bin/sh\\nexec /opt/python/bin/python3 -P -m tsqp "$@"\\n' > $COMMAND; chmod 755 $COMMAND
over /srv mode=755; mkdir -p /srv/models/llama; mount --bind "$MODEL" /srv/models/llama
mount --bind "$held/passwd" /etc/passwd
over /var/lib mode=755; over /var/cache mode=755; over /run mode=755
for place in lib/$NAME cache/$NAME; do mkdir /var/$place; mount --bind "$held/$place" /var/$place; done
for place in tsqp tsqp-worker; do mkdir /run/$place; mount --bind "$held/run/$place" /run/$place; done
over /root mode=000; over /home mode=000
over /tmp mode=1777
mount -o remount,bind,ro /
cd /
exec setpriv --reuid $USER_ID --regid $USER_ID --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \\
    prlimit --core=0 env -i "$@"
"""


def make_places(directory: Path) -> None:
    """State, cache and runtime directories of both users, as systemd makes them for the units."""
    directory.chmod(0o755)
    lines = [f"{name}:x:{number}:{number}::/:/usr/sbin/nologin" for name, number in USERS.items()]
    (directory / "passwd").write_text("\n".join(["root:x:0:0::/root:/bin/sh", *lines, ""]))
    for name, number in USERS.items():
        for kind, mode in (("lib", 0o700), ("cache", 0o700), ("run", 0o755 if name == "tsqp-worker" else 0o700)):
            place = directory / kind / name
            place.mkdir(parents=True)
            place.chmod(mode)
            os.chown(place, number, number)


@contextmanager
def started(unit: Path, environment: dict[str, str], places: Path, model: Path) -> Iterator[subprocess.Popen[str]]:
    """A unit's process; standard error is its log. Killed at the end if it is still there."""
    settings = settings_of(unit)
    (name,) = settings["User"]
    own = dict(word.split("=", 1) for line in settings["Environment"] for word in shlex.split(line))
    for mark, path in SPECIFIERS.items():
        own = {variable: value.replace(mark, path) for variable, value in own.items()}
    found = {"PYTHONPATH": "/opt/src:/opt/site:/opt/more", "LD_LIBRARY_PATH": "/opt/python/lib", "PATH": "/usr/bin"}
    assigned = [f"{variable}={value}" for variable, value in {**found, **own, **environment}.items()]
    alone = ["--net"] if settings.get("PrivateNetwork") == ["yes"] else []
    command = ["unshare", "--mount", "--propagation", "private", *alone, "bash", "-c", PREPARE, "unit", *assigned]
    with subprocess.Popen(
        [*command, COMMAND, *arguments_of(unit, environment)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **installation(), "PLACES": str(places), "MODEL": str(model), "NAME": name}
        | {"USER_ID": str(USERS[name]), "COMMAND": COMMAND},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def installation() -> dict[str, str]:
    """Where the interpreter, its packages and this package are."""
    site = sysconfig.get_path("purelib")
    numpy = next(path for path in sys.path if (Path(path) / "numpy").is_dir())
    return {
        "PYTHON": sys.base_prefix,
        "SITE": site,
        "MORE_SITE": "" if numpy == site else numpy,
        "SOURCE": str(Path(tsqp.__file__).parents[1]),
    }
