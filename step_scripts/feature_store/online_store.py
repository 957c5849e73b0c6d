"""The online store of a SageMaker feature group: the latest event of each record, written and read back in batches.

Only the online store is addressed (`TargetStores`); what is offline has been written as files. The store keeps the
event with the greatest event time and ignores all others, silently. So every record is read back: one that the store
holds in another state although it has no later event is removed for good and written again.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import polars as pl

from step_scripts.feature_store.comparison import WriteItem, item_events
from step_scripts.feature_store.online_client import (
    EVENT_TIME,
    RECORD_ID,
    OnlineClient,
    decoded_record,
    decoded_time,
    encoded_records,
    encoded_time,
)
from step_scripts.parameters import OnlineTarget
from step_scripts.runner import storage
from step_scripts.runner.contract import StepContext, StepError
from step_scripts.runner.processes import repeated
from step_scripts.runner.storage import service_client
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

_MISSING_RECORDS = "missing_record_ids.csv"
_SHOWN = 10  # ids in a message
_PART_RECORDS = 20_000  # of a call: people see how far it is after each
_REPORTED_EVERY = 30.0  # seconds
_LOOKUP_SECONDS = 5.0  # how long calls are repeated when the state is looked up after a failure
_BATCH = 100  # records a thread writes and reads back; one BatchGetRecord
_SECOND = 1_000_000  # microseconds
_CONSISTENT_AFTER = (0.2, 0.8, 2.0)  # seconds between readings: the store is eventually consistent

# Runs `function(*call)` for each call, in any order and anywhere; yields (index of the call, result).
ParallelRun = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]


@dataclass(frozen=True, eq=False)
class OnlineRecord:
    """The state that a record is to have: its event time, and its features as text. None: deleted."""

    record_id: str
    event_time: int  # microseconds since 1970, whole milliseconds
    features: dict[str, str] | None


def bring_online(
    run: ParallelRun,
    items: Sequence[WriteItem],
    table: TableSpec,
    target: OnlineTarget,
    expected: int,
    context: StepContext,
    offline: str,
) -> None:
    """Have the online store hold the `expected` records of the pieces `items`.

    Raises `StepError` if it does not: with how many it holds, how the `offline` store still is, and the first ids of
    the others; all of them are written to a file that is kept.
    """
    log, missing_uri = context.log, storage.join(context.output_uri("features"), _MISSING_RECORDS)
    parts = [(item, -(-item.rows // _PART_RECORDS)) for item in items]
    calls = [(item, part, count, table, target) for item, count in parts for part in range(count)]
    written, since = 0, time.monotonic()

    def report() -> None:
        if (waited := time.monotonic() - since) >= _REPORTED_EVERY:
            log.info(
                f"online store: {written:,} of {counted(expected, 'record')}, nothing more for {waited:.0f} s; "
                f"throttling and outages are waited out for up to {target.retry_timeout_seconds:.0f} s"
            )

    try:
        with repeated(report, _REPORTED_EVERY, "online-progress"):
            for _, count in run(write_online, calls):
                since = time.monotonic()
                written += count
                log.info(f"{written:,} of {counted(expected, 'record')} in the online store")
    except StepError as error:
        problem = error
    else:
        return
    missing = unread = 0
    first = list[str]()
    with storage.open_output(missing_uri) as listing:
        listing.write(b"record_id\n")
        for _, (others, unknown) in run(look_up_online, calls):
            ids = [*others, *unknown]
            missing += len(ids)
            unread += len(unknown)
            first = heapq.nsmallest(_SHOWN, [*first, *ids])
            listing.write("".join(f"{record_id}\n" for record_id in sorted(ids)).encode())
    named = f": {', '.join(first)}{' and others' if missing > len(first) else ''}" if first else ""
    unclear = f" (nothing is known of {unread:,} of these: they cannot be read now)" if unread else ""
    raise StepError(
        f"{problem}. Online: {expected - missing:,} of {counted(expected, 'record')} as this ingestion has them, "
        f"{missing:,} not{unclear}{named}. {_MISSING_RECORDS} lists them all. Offline: none of them; the offline store "
        f"is as before: {offline}. Nothing was committed. Remedy: ingest again when the online store answers, which "
        "writes what is missing, or with fewer calls in flight",
        details={
            "records_online": expected - missing,
            "records_missing_online": missing,
            "records_unread_online": unread,
            "missing_record_ids": list[Any](first),
            "records_offline": 0,
        },
        keep={_MISSING_RECORDS: missing_uri},
    ) from problem


def write_online(item: WriteItem, part: int, parts: int, table: TableSpec, target: OnlineTarget) -> int:
    """Write those events of `item` that are their records' latest, of its `parts` parts the one of number `part`.

    Returns how many. Raises `StepError` for the first that the store refuses, does not accept in time, or does not hold
    afterwards; nothing more is then written.
    """
    store = _store(target, target.retry_timeout_seconds, table)
    with ThreadPoolExecutor(target.in_flight) as pool:
        futures = [pool.submit(store.synchronize, batch) for batch in _batches(item, part, parts, table)]
        ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in ended if future.exception() is not None]
        if failed:
            store.stop.set()
            pool.shutdown(cancel_futures=True)
    return sum(future.result() for future in failed or futures)


def look_up_online(
    item: WriteItem, part: int, parts: int, table: TableSpec, target: OnlineTarget
) -> tuple[list[str], list[str]]:
    """Ids of the same records, as far as the store holds them in another state, or cannot be read."""
    store = _store(target, _LOOKUP_SECONDS, table)

    def look_up(batch: pl.DataFrame) -> tuple[list[str], list[str]]:
        if not store.stop.is_set():
            try:
                return [record.record_id for record in store.different(store.records(batch))], []
            except StepError:
                store.stop.set()
        return [], batch["record_id"].to_list()

    with ThreadPoolExecutor(target.in_flight) as pool:
        found = list(pool.map(look_up, _batches(item, part, parts, table)))
    return [i for others, _ in found for i in others], [i for _, unknown in found for i in unknown]


def _batches(item: WriteItem, part: int, parts: int, table: TableSpec) -> list[pl.DataFrame]:
    """Encoded by the thread that sends them: the text of all records at once would take much memory."""
    events = item_events(item, table).filter("is_latest")
    size = -(-events.height // parts)
    return list(events[part * size : (part + 1) * size].iter_slices(_BATCH))


def _store(target: OnlineTarget, retry_timeout_seconds: float, table: TableSpec) -> _Synchronizer:
    client = service_client("sagemaker-featurestore-runtime", target.region_name, target.in_flight, attempts=1)
    return _Synchronizer(client, target.group, retry_timeout_seconds, table=table)


@dataclass(frozen=True, kw_only=True)
class _Synchronizer(OnlineClient):
    """Brings records into their states."""

    table: TableSpec

    def records(self, events: pl.DataFrame) -> list[OnlineRecord]:
        """The states that events bring about."""
        return [
            OnlineRecord(features[RECORD_ID], decoded_time(features[EVENT_TIME]), None if is_deleted else features)
            for features, is_deleted in zip(encoded_records(events, self.table), events["is_deleted"], strict=True)
        ]

    def synchronize(self, events: pl.DataFrame) -> int:
        """Write and read back. Returns the number of records; raises `StepError` for those that stay different."""
        records = self.records(events)
        self._send(records)
        wrong = self.different(records)
        if ties := {r: moment for r, moment in wrong.items() if moment == r.event_time}:  # ignored for good: no waiting
            self._replace(ties)
            wrong = self.different(list(wrong))
        wrong = self._settled(wrong)
        if wrong:
            self._replace(wrong)
            wrong = self._settled(self.different(list(wrong)))
        if wrong:
            raise StepError(
                f"{len(wrong):,} of {counted(len(records), 'record')} written to the online store of feature group "
                f"{self.group} cannot be read from it as they were"
            )
        return len(records)

    def _settled(self, wrong: dict[OnlineRecord, int | None]) -> dict[OnlineRecord, int | None]:
        """What is still wrong after the store has had time to become consistent."""
        for pause in _CONSISTENT_AFTER:
            if not wrong:
                break
            time.sleep(pause)
            wrong = self.different(list(wrong))
        return wrong

    def _send(self, records: Sequence[OnlineRecord]) -> None:
        puts = [record.features for record in records if record.features is not None]
        self.write(puts)
        self.delete([(r.record_id, encoded_time(r.event_time)) for r in records if r.features is None])

    def _replace(self, wrong: Mapping[OnlineRecord, int | None]) -> None:
        """Remove for good what is in the way, a record or the trace of a deletion, and write again."""
        known = [moment for record, present in wrong.items() for moment in (record.event_time, present or 0)]
        later = encoded_time(max(time.time_ns() // 1000, *known) + _SECOND)
        self.delete([(r.record_id, later) for r in wrong], hard=True)
        self._send([record for record in wrong if record.features is not None])

    def different(self, records: Sequence[OnlineRecord]) -> dict[OnlineRecord, int | None]:
        """Records that are not in their state and have no later event either, with the event time that they have.

        A later event is that of another writer, who commits after this one or has failed and will be repeated.
        """
        found = self.read([r.record_id for r in records])
        wrong: dict[OnlineRecord, int | None] = {}
        for record in records:
            present = found.get(record.record_id)
            moment = decoded_time(present[EVENT_TIME]) if present else None
            if moment is not None and moment > record.event_time:
                continue
            wanted = record.features
            if present is None or wanted is None:
                is_same = present is wanted
            else:  # by value: the store may write a number in another way
                is_same = decoded_record(present, self.table) == decoded_record(wanted, self.table)
            if not is_same:
                wrong[record] = moment
        return wrong
