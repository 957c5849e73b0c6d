"""A root that cannot be written is found before anything is done, and said once, in a few lines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from housing_assets.settings import Settings
from step_scripts.runner import storage


class UnusableRoot(Exception):
    """The run would fail at the first thing that it writes."""


def check_root_is_writable() -> None:
    """Make the deployment's root if there is none, and try to write there. Raises `UnusableRoot`."""
    root = Settings.load().own_root
    if storage.is_remote(root):
        return
    try:
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusableRoot(
            f"the folder for data and models, {root}, cannot be written: {error.strerror or error}. Give this user "
            f"(number {os.geteuid()}) the right to write there, or set HOUSING_ROOT to another folder. "
            "Nothing has been done"
        ) from None
