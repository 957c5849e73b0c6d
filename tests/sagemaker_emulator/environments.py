"""The virtual environments of containers that install packages: copies, made of hard links."""

import contextlib
import hashlib
import os
import shutil
import threading
from pathlib import Path

from tests.sagemaker_emulator.hosts import Host


class Environments:
    """Gives each host a copy of its image's environment; keeps what a host that succeeded has installed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()

    def give(self, python: str, host: Host, keep: bool) -> Path:
        """Make the host's copy; returns the folder of its interpreter as the host sees it.

        `keep`: the copy is of the one kept, if there is one, and is kept itself once the host's command has ended well.
        """
        kept = self._root / hashlib.sha256(python.encode()).hexdigest()[:16]
        copy = host.directory / "environment"
        template = kept if keep and kept.exists() else Path(python).parents[1]
        # pip and the compiler of bytecode replace files, so that those of other copies stay as they are.
        shutil.copytree(template, copy, symlinks=True, copy_function=_link)
        if keep and template != kept:
            host.on_close = lambda: self._keep(host, copy, kept)
        return Path(host.show_environment(copy), "bin")

    def _keep(self, host: Host, copy: Path, kept: Path) -> None:
        with self._lock:
            if host.exit_code == 0 and not kept.exists():
                self._root.mkdir(exist_ok=True)
                copy.rename(kept)


def _link(source: str, target: str) -> None:
    with contextlib.suppress(OSError):  # another file system, or one without hard links
        os.link(source, target)
        return
    shutil.copy2(source, target)
