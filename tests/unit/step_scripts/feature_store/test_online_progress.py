"""What people read while the pieces of an ingestion write to the online store, or wait for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from step_scripts.feature_store import online_progress
from step_scripts.feature_store.online_calls import Patience, write_records
from step_scripts.feature_store.online_progress import PiecePlace, PieceReport, progress_reported
from step_scripts.runner.contract import StepError
from tests.feature_rows import Log


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_progress, "_TOLD_EVERY", 0.0)
    monkeypatch.setattr(online_progress, "_REPORTED_EVERY", 0.01)


def until_said(log: Log, text: str) -> None:
    """Returns when a message with the text is there."""
    deadline = time.monotonic() + 60
    while not any(text in message for message in log.messages):
        assert time.monotonic() < deadline, log.messages
        time.sleep(0.01)


class Throttled:
    """A store that accepts nothing; `asked` is called each time."""

    def __init__(self, asked: Any) -> None:
        self._asked = asked

    def batch_write_record(self, Entries: list[Any]) -> dict[str, Any]:
        self._asked()
        return {"UnprocessedEntries": Entries}


def test_progress_and_waiting_are_told(tmp_path: Path) -> None:
    log = Log()
    first, second = (PieceReport(PiecePlace(str(tmp_path), number)) for number in range(2))
    with progress_reported(log, str(tmp_path), 500, 900.0):
        first.written(100)
        second.written(25)
        until_said(log, "online store: at least 125 of 500 records written")
        store = Throttled(lambda: until_said(log, "125 of 500"))
        with pytest.raises(StepError, match="has accepted no request for 1 s"):
            write_records(store, "sales", [{"record_id": "a"}], Patience(1.0, second.waiting))
        until_said(log, "which is waited out for up to 900 s: 1 entry not processed")
        second.written(10)
        until_said(log, "at least 135 of 500 records written")


def test_a_piece_that_gives_up_stops_the_others(tmp_path: Path) -> None:
    first, second = (PieceReport(PiecePlace(str(tmp_path), number)) for number in range(2))
    first.give_up()
    assert PieceReport(PiecePlace(str(tmp_path), 2)).stop.is_set(), "one that begins later"
    store = Throttled(lambda: None)
    with pytest.raises(StepError, match="is given up"):
        write_records(store, "sales", [{"record_id": "a"}], Patience(600.0, second.waiting, second.stop))
