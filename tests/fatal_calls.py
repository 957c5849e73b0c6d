"""Calls that end the process they are made in, as a lack of memory does."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def once_fatal(marker: str, value: int) -> int:
    """Ends its process the first time that it is called with this marker."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return value * value
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def always_fatal() -> None:
    """Ends its process."""
    os.kill(os.getpid(), signal.SIGKILL)
