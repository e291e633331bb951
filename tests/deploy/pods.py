"""A pod's containers as processes of this machine, as far as namespaces of mounts go: for tests.

Volumes are as Kubernetes makes them: an emptyDir is open to all, files of a Secret belong to root and are readable by
the pod's group. Each container has a root of its own, which is read-only, with what its ``volumeMounts`` say; its user
has no capability and gets no privilege. Not applied: networks, limits, seccomp.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.confined import installation
from tests.deploy.manifests import Manifest
from tests.deploy.recipes import of

SYSTEM = ("bin", "sbin", "lib", "lib64", "usr", "etc", "proc", "sys", "dev")

VOLUMES = """
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
held=/mnt; mount -t tmpfs -o mode=755 tmpfs "$held"; cd "$held"
{volumes}
{containers}
"""
CONTAINER = """
root=$held/root; mkdir -p "$root"; mount -t tmpfs -o mode=755 tmpfs "$root"
for name in {system}; do
  if [ -L "/$name" ]; then cp -P "/$name" "$root/$name"
  elif [ -d "/$name" ]; then mkdir "$root/$name"; mount --rbind "/$name" "$root/$name"; fi
done
mkdir -p "$root/opt/python" "$root/opt/site" "$root/opt/src" "$root/opt/more" "$root/opt/tsqp/bin"
mount --bind "$PYTHON" "$root/opt/python"; mount --bind "$SITE" "$root/opt/site"; mount --bind "$SOURCE" "$root/opt/src"
[ -z "$MORE_SITE" ] || mount --bind "$MORE_SITE" "$root/opt/more"
python=$root/opt/tsqp/bin/python
printf '#!/bin/sh\\nexec /opt/python/bin/python3 "$@"\\n' > "$python"; chmod 755 "$python"
{mounts}
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid {user} --regid {group} --clear-groups --no-new-privs --bounding-set=-all \\
    --inh-caps=-all env -i --chdir=/ {command}
"""


def command_of(name: str, container: Manifest, side: str, replaced: Mapping[str, str]) -> str:
    """Environment and command line, as the image and the manifest have them, with some words replaced."""
    (entry,) = of(side, "final", "ENTRYPOINT")
    words = [*container.get("command", [] if container["name"] == "prepare" else json.loads(entry))]
    words += container.get("args", [])
    words = [word.replace("$(NAME)", f"{name}-0") for word in words]
    for old, new in replaced.items():
        words = [word.replace(old, new) for word in words]
    (told,) = of(side, "final", "ENV")
    # Instead of a virtual environment, as the recipe makes it.
    ours = ["PYTHONPATH=/opt/src:/opt/site:/opt/more", "LD_LIBRARY_PATH=/opt/python/lib", "PATH=/usr/bin:/bin"]
    return shlex.join([*ours, *told.split(), *words])


def script_of(
    name: str,
    template: Manifest,
    side: str,
    files: Mapping[str, Mapping[str, bytes]],
    model: Path,
    replaced: Mapping[str, str],
) -> str:
    """Makes the volumes, runs what prepares the pod and becomes its first container. ``files``: by volume."""
    spec, lines = template["spec"], []
    user = spec["securityContext"]
    for volume in spec["volumes"]:
        place = volume["name"]
        if "emptyDir" in volume:
            lines.append(f"mkdir {place}; mount -t tmpfs -o mode=2777,gid={user['fsGroup']} tmpfs {place}")
        elif "persistentVolumeClaim" in volume:
            lines.append(f"mkdir {place}; mount --bind {shlex.quote(str(model))} {place}")
        else:
            lines.append(f"mkdir {place}")
            for file, content in files[place].items():
                written = shlex.quote(content.decode("latin-1"))
                lines.append(f"printf %s {written} > {place}/{file}; chmod 440 {place}/{file}")
                lines.append(f"chown 0:{user['fsGroup']} {place}/{file}")
    steps = []
    main = spec["containers"][0]
    for container in (*spec.get("initContainers", ()), main):
        mounts = []
        for mount in container["volumeMounts"]:
            source, target = f"$held/{mount['name']}/{mount.get('subPath', '')}", f"$root{mount['mountPath']}"
            mounts.append(f'mkdir -p "{target}"; mount --bind "{source}" "{target}"')
            if mount.get("readOnly"):
                mounts.append(f'mount -o remount,bind,ro "{target}"')
        body = CONTAINER.format(
            system=" ".join(SYSTEM),
            mounts="\n".join(mounts),
            user=user["runAsUser"],
            group=user["runAsGroup"],
            command=command_of(name, container, side, replaced),
        )
        start = "exec unshare" if container is main else "unshare"
        steps.append(f"export held; {start} --mount --propagation private bash -ec {shlex.quote(body)}")
    return VOLUMES.format(volumes="\n".join(lines), containers="\n".join(steps))


@contextmanager
def running(script: str) -> Iterator[subprocess.Popen[str]]:
    """A pod's first container; its standard output and its log are to be read. Killed at the end."""
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **installation()},
    ) as process:
        try:
            yield process
        finally:
            process.kill()
