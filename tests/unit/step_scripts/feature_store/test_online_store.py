"""What people read while an ingestion writes to the online store, or waits for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from step_scripts.feature_store import online_store
from step_scripts.feature_store.comparison import WriteItem
from step_scripts.feature_store.online_client import OnlineClient
from step_scripts.feature_store.online_store import bring_online
from step_scripts.parameters import OnlineTarget
from step_scripts.runner.contract import StepError
from tests.feature_rows import TABLE, Log, step_context
from tests.waiting import until

TARGET = OnlineTarget(group="sales", retry_timeout_seconds=900)


class Throttled:
    """A store that accepts nothing."""

    def batch_write_record(self, Entries: list[Any]) -> dict[str, Any]:
        return {"UnprocessedEntries": Entries}


def bring(folder: Path, log: Log, expected: int, outcomes: Any, looked_up: Any = ()) -> None:
    """Bring an item online, in parts of 100 records, whose outcomes are given."""

    def run(function: Any, calls: Sequence[Any]) -> Any:
        assert [(part, parts) for _, part, parts, *_ in calls] == [(n, len(calls)) for n in range(-(-expected // 100))]
        yield from enumerate(outcomes if function is online_store.write_online else looked_up)

    items = [WriteItem((), str(folder), expected)]
    bring_online(run, items, TABLE, TARGET, expected, step_context(str(folder), log), "nothing")


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_store, "_PART_RECORDS", 100)
    monkeypatch.setattr(online_store, "_REPORTED_EVERY", 0.05)


def test_progress_and_waiting_are_reported(tmp_path: Path) -> None:
    log = Log()

    def outcomes() -> Any:
        yield 100
        line = "100 of 150 records, nothing more for 0 s; throttling"
        until(lambda: any(line in message for message in log.messages))
        yield 50

    bring(tmp_path, log, 150, outcomes())
    assert [m for m in log.messages if "in the online store" in m] == [
        "100 of 150 records in the online store", "150 of 150 records in the online store"
    ]  # fmt: skip
    assert "waited out for up to 900 s" in "".join(log.messages)
    assert not list(tmp_path.rglob("*.csv"))


def test_the_records_that_are_missing_are_listed(tmp_path: Path) -> None:
    def outcomes() -> Any:
        yield 100
        raise StepError("it broke")

    looked_up = [(["d"], ["b"]), (["c"], [])]
    with pytest.raises(
        StepError, match=r"it broke\. Online: 197 of 200 .*3 not \(nothing is known of 1.*: b, c, d\."
    ) as caught:
        bring(tmp_path, Log(), 200, outcomes(), looked_up)
    listed = Path(caught.value.keep["missing_record_ids.csv"])
    assert sorted(listed.read_text().split()) == ["b", "c", "d", "record_id"]


def test_calls_are_repeated_for_a_while_or_until_another_thread_gives_up() -> None:
    with pytest.raises(StepError, match=r"has accepted no request for 1 s \(1 entry not processed\)"):
        OnlineClient(Throttled(), "sales", 1.0).write([{"record_id": "a"}])
    stop = threading.Event()
    stop.set()
    with pytest.raises(StepError, match="is given up"):
        OnlineClient(Throttled(), "sales", 600.0, stop).write([{"record_id": "a"}])
