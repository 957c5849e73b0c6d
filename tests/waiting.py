"""How tests wait for what comes sooner or later. A limit that the project promises is asserted in its test instead."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AMPLE_SECONDS = 300.0  # more than anything here takes where other programs use all cores


def until(
    look: Callable[[], Any],
    *,
    seconds: float = AMPLE_SECONDS,
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> Any:
    """What `look` returns once that is something. Fails, showing the log, if it is late or `process` ends before."""
    start = time.monotonic()
    while not (found := look()):
        waited = time.monotonic() - start
        assert process is None or process.poll() is None, f"the process has ended\n{log.read_text() if log else ''}"
        assert waited < seconds, f"not within {seconds:g} s\n{log.read_text() if log else ''}"
        # To look may cost much, as a list of all processes does; what came is noticed a tenth late.
        time.sleep(min(max(0.01, waited / 10), 0.25))
    return found
