"""The online store of a SageMaker feature group: the latest event of each record, written and read back in batches.

Only the online store is addressed (`TargetStores`); what is offline has been written as files. The store keeps the
event with the greatest event time and ignores all others, silently. So every record is read back: one that the store
holds in another state although it has no later event is removed for good and written again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl

from step_scripts.feature_store.feature_files import selected_rows
from step_scripts.feature_store.feature_values import (
    EVENT_TIME,
    decoded_record,
    decoded_time,
    encoded_records,
    encoded_time,
    online_time,
)
from step_scripts.feature_store.ingestion_plan import WriteItem
from step_scripts.feature_store.online_calls import Patience, delete_records, read_records, write_records
from step_scripts.feature_store.online_progress import PiecePlace, PieceReport
from step_scripts.runner.contract import StepError
from step_scripts.runner.s3_objects import service_client
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

_FIRST = 10  # ids of a piece that a message may show
_LOOKUP_SECONDS = 5.0  # patience when the state is looked up after a failure
_BATCH = 100  # records a thread writes and reads back; one BatchGetRecord
_SECOND = 1_000_000  # microseconds
_CONSISTENT_AFTER = (0.2, 0.8, 2.0)  # seconds between readings: the store is eventually consistent

_T = TypeVar("_T")


@dataclass(frozen=True)
class OnlineTarget:
    """Where an online store is, and how hard to press it.

    `in_flight`: calls at the same time, of each actor. `patience_seconds`: how long it may accept no entry of a batch.
    """

    group: str
    region_name: str | None = None
    in_flight: int = 16
    patience_seconds: float = 300.0


@dataclass(frozen=True, eq=False)
class OnlineRecord:
    """The state that a record is to have: its event time, and its features as text. None: deleted."""

    record_id: str
    event_time: int  # microseconds since 1970, whole milliseconds
    features: dict[str, str] | None


@dataclass(frozen=True)
class OnlineOutcome:
    """What became of the records of one piece: how many are as they should be, how many are not, and why.

    Of `unread` of the missing ones nothing is known: they cannot be read. `missing_uri`: a file with the ids of all,
    one a line. `problem` is empty where all is well, and where another piece's ended this one.
    """

    written: int
    missing: int = 0
    unread: int = 0
    problem: str = ""
    first_missing: tuple[str, ...] = ()
    missing_uri: str | None = None


def write_online(item: WriteItem, table: TableSpec, target: OnlineTarget, place: PiecePlace) -> OnlineOutcome:
    """Write those events of `item` that are their records' latest.

    After what the store refuses, does not accept in time, or does not hold afterwards, and once another piece has met
    with that, nothing more is written; it is then looked up what the store holds.
    """
    frames = [selected_rows(source, selections, item, table) for source, selections in item.sources]
    events = pl.concat(frames).filter("is_latest").drop("is_latest")
    store = service_client("sagemaker-featurestore-runtime", target.region_name, target.in_flight, attempts=1)
    # A batch is encoded by the thread that sends it: the text of all records at once would take much memory.
    batches = [events[at : at + _BATCH] for at in range(0, events.height, _BATCH)]
    report = PieceReport(place)
    keeper = _Synchronizer(store, target, Patience(target.patience_seconds, report.waiting, report.stop), table)

    def write(batch: pl.DataFrame) -> None:
        report.written(keeper.synchronize(_records(batch, table)))

    written, problem = _in_parallel(write, batches, target.in_flight, report.stop)
    if len(written) == len(batches):
        return OnlineOutcome(events.height)
    report.give_up()
    reader = _Synchronizer(store, target, Patience(_LOOKUP_SECONDS), table)
    left = [batch for number, batch in enumerate(batches) if number not in written]
    found, _ = _in_parallel(lambda batch: reader.wrong_ids(_records(batch, table)), left, target.in_flight)
    unread = [batch["record_id"].to_list() for number, batch in enumerate(left) if number not in found]
    missing = sorted(record_id for ids in (*found.values(), *unread) for record_id in ids)
    return OnlineOutcome(
        written=events.height - len(missing),
        missing=len(missing),
        unread=sum(map(len, unread)),
        problem=problem,
        first_missing=tuple(missing[:_FIRST]),
        missing_uri=place.write_missing(missing),
    )


def _records(events: pl.DataFrame, table: TableSpec) -> list[OnlineRecord]:
    deleted = events["is_deleted"].to_list()
    times = events["event_time"].to_physical().to_list()
    texts = encoded_records(events, table)
    return [
        OnlineRecord(features["record_id"], online_time(time_), None if gone else features)
        for features, time_, gone in zip(texts, times, deleted, strict=True)
    ]


class _Synchronizer:
    """Brings records into their states."""

    def __init__(self, store: Any, target: OnlineTarget, patience: Patience, table: TableSpec) -> None:
        self._store, self._group, self._patience, self._table = store, target.group, patience, table

    def synchronize(self, records: Sequence[OnlineRecord]) -> int:
        """Write and read back. Returns the number of records; raises `StepError` for those that stay different."""
        self._send(records)
        wrong = self._different(records)
        if ties := {r: moment for r, moment in wrong.items() if moment == r.event_time}:  # ignored for good: no waiting
            self._replace(ties)
            wrong = self._different(list(wrong))
        wrong = self._settled(wrong)
        if wrong:
            self._replace(wrong)
            wrong = self._settled(self._different(list(wrong)))
        if wrong:
            raise StepError(
                f"{len(wrong):,} of {counted(len(records), 'record')} written to the online store of feature group "
                f"{self._group} cannot be read from it as they were"
            )
        return len(records)

    def wrong_ids(self, records: Sequence[OnlineRecord]) -> list[str]:
        """Ids of those records that the store does not hold in their states."""
        return [record.record_id for record in self._different(records)]

    def _settled(self, wrong: dict[OnlineRecord, int | None]) -> dict[OnlineRecord, int | None]:
        """What is still wrong after the store has had time to become consistent."""
        for pause in _CONSISTENT_AFTER:
            if not wrong:
                break
            time.sleep(pause)
            wrong = self._different(list(wrong))
        return wrong

    def _send(self, records: Sequence[OnlineRecord]) -> None:
        puts = [record.features for record in records if record.features is not None]
        write_records(self._store, self._group, puts, self._patience)
        deletions = [(r.record_id, encoded_time(r.event_time)) for r in records if r.features is None]
        delete_records(self._store, self._group, deletions, self._patience)

    def _replace(self, wrong: Mapping[OnlineRecord, int | None]) -> None:
        """Remove for good what is in the way, a record or the trace of a deletion, and write again."""
        known = [moment for record, present in wrong.items() for moment in (record.event_time, present or 0)]
        later = encoded_time(max(time.time_ns() // 1000, *known) + _SECOND)
        delete_records(self._store, self._group, [(r.record_id, later) for r in wrong], self._patience, hard=True)
        self._send([record for record in wrong if record.features is not None])

    def _different(self, records: Sequence[OnlineRecord]) -> dict[OnlineRecord, int | None]:
        """Records that are not in their state and have no later event either, with the event time that they have.

        A later event is that of another writer, who commits after this one or has failed and will be repeated.
        """
        found = read_records(self._store, self._group, [r.record_id for r in records], self._patience)
        wrong: dict[OnlineRecord, int | None] = {}
        for record in records:
            present = found.get(record.record_id)
            moment = decoded_time(present[EVENT_TIME]) if present else None
            if moment is not None and moment > record.event_time:
                continue
            if not self._same(present, record.features):
                wrong[record] = moment
        return wrong

    def _same(self, present: dict[str, str] | None, wanted: dict[str, str] | None) -> bool:
        """By value: the store may write a number in another way."""
        if present is None or wanted is None:
            return present is wanted
        return decoded_record(present, self._table) == decoded_record(wanted, self._table)


def _in_parallel(
    function: Callable[[pl.DataFrame], _T],
    batches: Sequence[pl.DataFrame],
    threads: int,
    stop: threading.Event | None = None,
) -> tuple[dict[int, _T], str]:
    """Results by number of batch, and the first problem. After a `StepError`, or `stop`, no more calls are begun."""
    stop = stop or threading.Event()
    done: dict[int, _T] = {}
    problems: list[str] = []

    def call(number: int) -> None:
        if stop.is_set():
            return
        try:
            done[number] = function(batches[number])
        except BaseException as error:
            if isinstance(error, StepError) and not stop.is_set():
                problems.append(str(error))
            stop.set()
            if not isinstance(error, StepError):
                raise

    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(batches)))) as pool:
        for _ in pool.map(call, range(len(batches))):
            pass
    return done, problems[0] if problems else ""
