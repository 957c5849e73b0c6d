"""What the pieces of an ingestion tell each other, and people, while they write to the online store: small files.

A piece writes how far it is, at most every few seconds, beside those of the others in the ingestion's scratch folder.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from step_scripts.runner import storage
from step_scripts.runner.background import repeated
from step_scripts.runner.contract import Reporter
from step_scripts.runner.wording import counted

_TOLD_EVERY = 5.0  # seconds, by a piece
_REPORTED_EVERY = 15.0  # seconds, to people
_GIVEN_UP = "given-up"


@dataclass(frozen=True)
class PiecePlace:
    """Where the piece of that number leaves its files."""

    folder: str
    number: int

    def write_missing(self, ids: Sequence[str]) -> str:
        """Write the ids, one a line. Returns the URI."""
        uri = storage.join(self.folder, f"{self.number}.missing")
        storage.write_bytes(uri, "".join(f"{record_id}\n" for record_id in ids).encode())
        return uri


class PieceReport:
    """Tells how far a piece is. `stop` is set once this or another piece has given up."""

    def __init__(self, place: PiecePlace) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"written": 0, "waited": 0.0, "reason": ""}
        self._told = time.monotonic()
        self.stop = threading.Event()
        self._look()

    def written(self, count: int) -> None:
        """So many more records are as they should be."""
        with self._lock:
            self._state = {"written": self._state["written"] + count, "waited": 0.0, "reason": ""}
            self._tell()

    def waiting(self, reason: str, waited: float) -> None:
        """Nothing has been accepted for `waited` seconds."""
        with self._lock:
            self._state |= {"waited": waited, "reason": reason}
            self._tell()

    def give_up(self) -> None:
        """Have the other pieces stop."""
        with contextlib.suppress(OSError):
            storage.write_bytes(storage.join(self._place.folder, _GIVEN_UP), b"")

    def _tell(self) -> None:
        if time.monotonic() - self._told < _TOLD_EVERY:
            return
        with contextlib.suppress(OSError):  # a message less
            storage.write_bytes(
                storage.join(self._place.folder, f"{self._place.number}.json"), json.dumps(self._state).encode()
            )
        self._look()
        self._told = time.monotonic()

    def _look(self) -> None:
        with contextlib.suppress(OSError):
            if storage.exists(storage.join(self._place.folder, _GIVEN_UP)):
                self.stop.set()


@contextlib.contextmanager
def progress_reported(log: Reporter, folder: str, expected: int, patience_seconds: float) -> Iterator[None]:
    """Within the block, log how far the pieces are, and for what they wait."""
    before = -1

    def report() -> None:
        nonlocal before
        states = list(_states(folder))
        done = sum(state["written"] for state in states)
        text = f"online store: at least {done:,} of {counted(expected, 'record')} written"
        waiting = max(states, key=lambda state: state["waited"], default=None)
        if waiting is not None and waiting["reason"]:
            log.warning(
                f"{text}; it has accepted nothing for {waiting['waited']:.0f} s, which is waited out for up to "
                f"{patience_seconds:.0f} s: {waiting['reason']}"
            )
        elif done != before:
            log.info(text)
        before = done

    with repeated(report, _REPORTED_EVERY, "online-progress"):
        yield


def _states(folder: str) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError):
        for uri in storage.list_files(folder):
            if uri.endswith(".json"):
                with contextlib.suppress(OSError, ValueError):
                    yield json.loads(storage.read_bytes(uri))
