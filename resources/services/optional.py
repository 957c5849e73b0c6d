"""Services that a run can do without: their failure is a warning, and they are waited for a minute at most."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

SECONDS = 60.0


def attempt(work: Callable[[], object], seconds: float = SECONDS) -> str | None:
    """Do `work` in a thread. Returns why it failed or that it took longer than `seconds`; None if it is done.

    What takes longer goes on beside the run, and ends with its process.
    """
    outcome: list[str | None] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # whatever it is: what the run has made does not depend on it
            reason = str(error).strip() or "no reason given"
            outcome.append(f"{type(error).__name__}: {reason}")
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="optional service", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


def extra(name: str, make: Callable[[], Any], log: Any) -> dict[str, Any]:
    """Metadata that nothing depends on, by its name; nothing but a warning in `log` where it cannot be made."""
    try:
        return {name: make()}
    except Exception as error:  # noqa: BLE001  # what it describes is done
        log.warning(f"{name} is left out of the metadata: {type(error).__name__}: {error}")
        return {}
