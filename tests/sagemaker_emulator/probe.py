"""What kind of emulated hosts this machine allows."""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Abilities:
    """Whether hosts can have namespaces, whether their root can be copy-on-write, and why not."""

    namespaces: bool
    overlay: bool
    reason: str = ""


_UNSHARE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL"]
_OVERLAY_TEST = (
    "set -e; mount -t tmpfs tmpfs /dev/shm; mkdir /dev/shm/u /dev/shm/w /dev/shm/m; "
    "mount -t overlay overlay -o lowerdir=/,upperdir=/dev/shm/u,workdir=/dev/shm/w /dev/shm/m; "
    "chroot /dev/shm/m true"
)


@functools.cache
def abilities() -> Abilities:
    """Probe once per process, by doing what a host does."""
    if not sys.platform.startswith("linux"):
        return Abilities(False, False, f"namespaces need Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        return Abilities(False, False, "namespaces need root")
    if missing := [tool for tool in ("ip", "unshare", "setpriv", "mount") if shutil.which(tool) is None]:
        return Abilities(False, False, f"namespaces need {', '.join(missing)} (iproute2, util-linux)")
    link = f"smprobe{os.getpid():x}"[:15]
    bridge = subprocess.run(["ip", "link", "add", link, "type", "bridge"], capture_output=True, text=True)
    if bridge.returncode:
        return Abilities(False, False, f"no bridge: {bridge.stderr.strip()}")
    subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
    plain = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True)
    if plain.returncode:
        return Abilities(False, False, f"no namespaces: {plain.stderr.strip()}")
    overlay = subprocess.run([*_UNSHARE, "sh", "-c", _OVERLAY_TEST], capture_output=True, text=True)
    if overlay.returncode:
        return Abilities(True, False, f"no overlay over /: {overlay.stderr.strip()}")
    return Abilities(True, True)
