"""Folders and files that only their user may read. Existing ones keep their mode. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def private_folder(path: Path) -> None:
    """Create the folder and its missing parents, each with mode 0700. Does nothing if it exists."""
    missing = []
    folder = path
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not missing and not path.is_dir():
        raise FileExistsError(f"{path} is no folder")


def open_private(path: Path, mode: str = "wb") -> IO[bytes]:
    """Open a binary file for writing or appending; a new one has mode 0600."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600. Raises `FileExistsError`."""
    with open_private(path, "xb") as file:
        file.write(data)
