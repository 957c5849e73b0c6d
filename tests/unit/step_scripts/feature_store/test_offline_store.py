"""The local feature store against a model of what it should hold, and against crashes, races and damage."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_scripts.feature_store import comparison, group_places, ingestion
from step_scripts.feature_store.commits import digest_of
from step_scripts.feature_store.comparison import divided
from step_scripts.feature_store.group_places import LocalGroup
from step_scripts.feature_store.iceberg_table import CommitTaken
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.table.hashes import content_hashes, event_hashes, hash_sums, text_hashes
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests import ROOT
from tests.feature_rows import (
    NOON,
    TABLE,
    Row,
    ingest_rows,
    prepared_ingestion,
    record_id,
    records,
    row,
    rows_frame,
    run_here,
    scan,
    write_frame,
    write_rows,
)
from tests.other_engines import opened

# --- model ---------------------------------------------------------------------------------------------------------

Event = tuple[datetime, int, tuple[Any, ...] | None]  # event time, commit, content; None: deleted


class Model:
    """What the store should hold: of each record, the events that are stored. Written for clarity, not for speed."""

    def __init__(self) -> None:
        self.timelines: dict[str, list[Event]] = {}
        self.number = 0

    def ingest(self, rows: Sequence[Row], *, mirror: bool) -> None:
        self.number += 1
        incoming: dict[str, list[Event]] = {}
        for key, time, *content in rows:
            incoming.setdefault(key, []).append((time, self.number, tuple(content)))
        for key, events in incoming.items():
            events.sort()
            stored = self.timelines.get(key, [])
            if mirror and stored:
                latest = stored[-1]
                if latest[2] != events[-1][2] and latest[0] > events[-1][0]:
                    events[-1] = (latest[0] + timedelta(microseconds=1), *events[-1][1:])
            self.timelines[key] = sorted([*stored, *self._news(stored, events)], key=_order)
        if mirror:
            end = max(time for _, time, *_ in rows)
            for key in set(self.timelines) - set(incoming):
                self._delete(key, max(end, self.timelines[key][-1][0] + timedelta(microseconds=1)))

    @staticmethod
    def _news(stored: list[Event], events: list[Event]) -> list[Event]:
        line = sorted([*stored, *events], key=_order)
        news = []
        for event in events:
            earlier = line[: line.index(event)]
            while earlier and earlier[-1] in events and earlier[-1][2] == event[2]:
                earlier.pop()
            in_force = bool(earlier) and earlier[-1] in stored and earlier[-1][2] == event[2]
            ending = list(line)
            while ending and ending[-1] in events and ending[-1][2] == event[2]:
                ending.pop()
            is_latest = bool(ending) and ending[-1] in stored and ending[-1][2] == event[2]
            if not in_force and not is_latest:
                news.append(event)
        return news

    def delete(self, key: str, time: datetime) -> None:
        before = [e for e in self.timelines.get(key, []) if e[0] <= time]
        if before and before[-1][2] is not None:
            self.number += 1
            self._delete(key, time)

    def _delete(self, key: str, time: datetime) -> None:
        if self.timelines[key][-1][2] is None and time >= self.timelines[key][-1][0]:
            return
        self.timelines[key] = sorted([*self.timelines[key], (time, self.number, None)], key=_order)

    def read(self, as_of: datetime | None = None) -> dict[str, tuple[Any, ...]]:
        found = {}
        for key, line in self.timelines.items():
            past = [e for e in line if as_of is None or e[0] <= as_of]
            if past and past[-1][2] is not None:
                found[key] = (past[-1][0], *past[-1][2])
        return found


def _order(event: Event) -> tuple[datetime, int]:
    return event[:2]


_times = st.sampled_from([0.0, 0.5, 1.0, 26.0, -1e6])
_batches = st.dictionaries(
    st.tuples(st.integers(0, 4), _times), st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([None, 3])), min_size=1
)
_operations = st.one_of(
    st.tuples(st.just("ingest"), _batches, st.booleans(), st.integers(1, 3)),
    st.tuples(st.just("ingest"), _batches, st.just(False), st.integers(1, 3)),
    st.tuples(st.just("delete"), st.integers(0, 4), _times),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(_operations, min_size=1, max_size=6), st.booleans())
def test_any_history_reads_as_the_model_says(operations: list[tuple[Any, ...]], small_pieces: bool) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        if small_pieces:  # as large data is worked on: many buckets, many pieces
            patch.setattr(comparison, "_PARTITION_EVENTS", 2)
            patch.setattr(ingestion, "_PIECE_ROWS", (1, 2))
        folder = Path(name)
        store, model = OfflineStore(str(folder / "store")), Model()
        for kind, *arguments in operations:
            if kind == "delete":
                number, hours = arguments
                if "sales" in store.groups():
                    store.delete_record("sales", record_id(number), NOON + timedelta(hours=hours))
                model.delete(record_id(number), NOON + timedelta(hours=hours))
            else:
                batch, mirror, parts = arguments
                rows = [row(n, price, hours=hours, rooms=rooms) for (n, hours), (price, rooms) in batch.items()]
                dataset = write_rows(folder, rows, parts=parts, digest=uuid.uuid4().hex)
                result = ingest_rows(store, dataset, mirror=mirror)
                model.ingest(rows, mirror=mirror)
                assert result.rows_in == result.rows_readable == len(rows)
                assert result.added + result.superseded + result.unchanged == len(rows)
                if mirror:
                    assert set(records(scan(store))) == {r[0] for r in rows}
                again = ingest_rows(
                    store, dataset.model_copy(update={"digest": uuid.uuid4().hex}), mirror=mirror, workers=2
                )
                assert (again.added, again.superseded, again.deleted, again.stored) == (0, 0, 0, ())
            _assert_same(store, model)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(_batches, st.none() | st.integers(0, 4)), min_size=1, max_size=4))
def test_data_that_arrives_in_order_reads_as_its_last_event_says(batches: list[tuple[Any, ...]]) -> None:
    """Against the plain log of all events ever sent in, of which the store keeps only what is news."""
    with tempfile.TemporaryDirectory() as name:
        store = OfflineStore(str(Path(name) / "store"))
        log: list[tuple[datetime, str, tuple[Any, ...] | None]] = []
        for number, (batch, deleted) in enumerate(batches):
            # From one batch to the next time goes on, or stands still.
            since = 26.0 * number
            rows = [row(n, p, hours=since + h % 27, rooms=r) for (n, h), (p, r) in batch.items() if h >= 0]
            if rows:
                ingest_rows(store, write_rows(Path(name), rows))
                log += [(time, key, tuple(content)) for key, time, *content in rows]
            if deleted is not None and log:
                moment = NOON + timedelta(hours=since + 26)
                store.delete_record("sales", record_id(deleted), moment)
                log.append((moment, record_id(deleted), None))
        log.sort(key=lambda event: event[0])  # stable: of one time, the later sent wins
        for moment in sorted({event[0] for event in log}):
            state = {key: content for time, key, content in log if time <= moment}
            expected = {key: content for key, content in state.items() if content is not None}
            assert {k: v[1:] for k, v in records(scan(store, as_of=moment)).items()} == expected


def _assert_same(store: OfflineStore, model: Model) -> None:
    if "sales" not in store.groups():
        assert not model.timelines
        return
    live = records(scan(store))
    assert live == model.read()
    for hours in (-1e6, 0.0, 0.25, 1.0, 26.0):
        moment = NOON + timedelta(hours=hours)
        assert records(scan(store, as_of=moment)) == model.read(moment)
    for number in range(5):
        found = store.get_record("sales", record_id(number))
        assert (tuple(found.values())[1:] if found else None) == live.get(record_id(number))
    commit = store.commits("sales")[-1]
    assert commit.live_rows == len(live)
    assert commit.live_digest == _digest(scan(store).collect())
    if not commit.deduplicate:
        assert sum(f.rows or 0 for f in store.state("sales").files) == len(live)


def _digest(frame: pl.DataFrame) -> str:
    time = frame["event_time"].to_physical().to_numpy()
    return digest_of(
        hash_sums(event_hashes(text_hashes(frame["record_id"]), time, content_hashes(frame, TABLE.column_names)))
    )


# --- ingestion -----------------------------------------------------------------------------------------------------


def _parquet_files(store: OfflineStore) -> list[str]:
    return [uri for uri in storage.list_files(store.folder("sales").data_uri) if uri.endswith(".parquet")]


@pytest.fixture
def store(tmp_path: Path) -> OfflineStore:
    return OfflineStore(str(tmp_path / "store"))


def test_files_are_of_one_day_and_sorted_by_record(store: OfflineStore, tmp_path: Path) -> None:
    rows = [row(n, hours=h) for n, h in enumerate([0, 0.1, 11.9, 12, -24 * 366 * 152])]
    result = ingest_rows(store, write_rows(tmp_path, rows))
    assert len({file.path.partition("/")[0] for file in result.stored}) == 3
    matches = [
        re.fullmatch(r"event_time_day=(.{10})/[A-Z0-9]{6}-([0-9a-f]{64})\.parquet", f.path) for f in result.stored
    ]
    assert sorted(m.group(1) for m in matches if m) == ["1872-01-07", "2024-05-01", "2024-05-02"]
    assert store.state("sales").files == list(result.stored)
    state = store.state("sales")
    for file, times in zip(state.files, state.event_times, strict=True):
        path = _group(store).data / file.path
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
        frame = pl.read_parquet(path)
        assert frame.columns[:2] == ["record_id", "event_time"]
        assert frame.columns[-3:] == ["write_time", "api_invocation_time", "is_deleted"]
        assert frame["record_id"].is_sorted()
        assert frame["write_time"].dtype == pl.Datetime("us", "UTC")
        assert (frame["event_time"].min(), frame["event_time"].max()) == times
        assert pq.read_schema(path).field("PRICE").metadata == {b"PARQUET:field_id": b"3"}


def test_the_same_dataset_adds_nothing_and_makes_no_commit(store: OfflineStore, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, [row(n) for n in range(5)])
    first = ingest_rows(store, dataset)
    again = ingest_rows(store, dataset)
    assert (first.added, first.already_ingested) == (5, False)
    assert (again.unchanged, again.rows_readable, again.already_ingested) == (5, 5, True)
    assert len(store.commits("sales")) == 1
    assert len(_parquet_files(store)) == 1


def test_a_file_saved_again_stores_nothing_and_is_known_from_then_on(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(n) for n in range(5)]))
    saved_again = write_rows(tmp_path, [row(n, hours=5) for n in range(5)])
    before = store.state("sales").artifact()
    result = ingest_rows(store, saved_again)
    assert (result.unchanged, result.stored, result.commit.deduplicate) == (5, (), False)
    assert store.state("sales").artifact() == before
    assert ingest_rows(store, saved_again).already_ingested


def test_a_changed_row_supersedes_and_an_older_one_is_history(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0, 1.0), row(1, 1.0)]))
    changed = ingest_rows(store, write_rows(tmp_path, [row(0, 2.0), row(1, 0.5, hours=-1)]))
    assert (changed.superseded, changed.added, changed.outdated) == (1, 1, 1)
    assert changed.commit.deduplicate
    assert {k: v[1] for k, v in records(scan(store)).items()} == {record_id(0): 2.0, record_id(1): 1.0}
    early = records(scan(store, as_of=NOON - timedelta(minutes=1)))
    assert {k: v[1] for k, v in early.items()} == {record_id(1): 0.5}
    assert records(scan(store, commit=1)) == {record_id(n): (NOON, 1.0, 3, True) for n in range(2)}


def test_a_dataset_that_was_superseded_is_not_taken_for_known(store: OfflineStore, tmp_path: Path) -> None:
    first, second = (write_rows(tmp_path, [row(0, price)]) for price in (1.0, 2.0))
    ingest_rows(store, first)
    ingest_rows(store, second)
    back = ingest_rows(store, first)
    assert (back.already_ingested, back.superseded) == (False, 1)
    assert store.get_record("sales", record_id(0)) == {
        "record_id": record_id(0), "event_time": NOON, "PRICE": 1.0, "ROOMS": 3, "SOLD": True
    }  # fmt: skip


def test_mirror_follows_the_dataset_also_back_to_an_older_file(store: OfflineStore, tmp_path: Path) -> None:
    older = write_rows(tmp_path, [row(0), row(1), row(2, 1.0)])
    newer = write_rows(tmp_path, [row(0, hours=2), row(2, 2.0, hours=2)])
    ingest_rows(store, older, mirror=True)
    dropped = ingest_rows(store, newer, mirror=True)
    assert (dropped.deleted, dropped.superseded, dropped.unchanged) == (1, 1, 1)
    assert set(records(scan(store))) == {record_id(0), record_id(2)}
    back = ingest_rows(store, older, mirror=True)
    assert (back.deleted, back.outdated) == (0, 0)
    assert {k: v[1:] for k, v in records(scan(store)).items()} == {record_id(n): (1.0, 3, True) for n in range(3)}
    assert set(records(scan(store, as_of=NOON + timedelta(hours=2)))) == {record_id(0), record_id(2)}


def test_mirror_takes_an_older_row_for_the_latest(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0, 2.0, hours=2), row(1)]))
    result = ingest_rows(store, write_rows(tmp_path, [row(0, 1.0), row(1)]), mirror=True)
    assert (result.superseded, result.unchanged, result.outdated) == (1, 1, 0)
    moment = NOON + timedelta(hours=2)
    just_after = moment + timedelta(microseconds=1)
    assert records(scan(store))[record_id(0)] == (just_after, 1.0, 3, True)
    assert records(scan(store, as_of=moment))[record_id(0)] == (moment, 2.0, 3, True)
    again = ingest_rows(store, write_rows(tmp_path, [row(1), row(0, 1.0)]), mirror=True)
    assert (again.unchanged, again.stored) == (2, ())


def test_order_of_rows_and_parts_does_not_matter(tmp_path: Path) -> None:
    rows = [row(n % 7, float(n), hours=n // 7) for n in range(40)]
    stores = [OfflineStore(str(tmp_path / name)) for name in ("one", "two")]
    ingest_rows(stores[0], write_rows(tmp_path, rows))
    shuffled = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
    ingest_rows(stores[1], write_rows(tmp_path, shuffled, parts=4), workers=2)
    one, two = (s.commits("sales")[-1] for s in stores)
    assert (one.live_digest, one.live_rows, one.added) == (two.live_digest, two.live_rows, two.added)
    assert records(scan(stores[0])) == records(scan(stores[1]))


def test_a_small_dataset_is_compared_with_its_own_records_only(
    store: OfflineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_PARTITION_EVENTS", 2)
    ingest_rows(store, write_rows(tmp_path, [row(n) for n in range(50)]))
    compared: list[int] = []
    changes = comparison.changes

    def counted(incoming: pl.DataFrame, stored: pl.DataFrame, mirror_time: int | None) -> Any:
        compared.append(stored.height)
        return changes(incoming, stored, mirror_time)

    monkeypatch.setattr(comparison, "changes", counted)
    result = ingest_rows(store, write_rows(tmp_path, [row(0, 2.0, hours=1), row(1), row(99)]))
    assert (result.superseded, result.unchanged, result.added, sum(compared)) == (1, 1, 1, 2)
    assert result.commit.live_digest == _digest(scan(store).collect())


def test_rows_of_other_programs_are_left_alone(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    table = opened(store.root)
    events = table.scan().to_arrow()
    table.append(events.set_column(events.column_names.index("record_id"), "record_id", [["theirs"]]))
    assert (set(records(scan(store))), len(store.state("sales").files)) == ({record_id(0)}, 1)
    assert store.get_record("sales", "theirs") is None
    changed = ingest_rows(store, write_rows(tmp_path, [row(0, 2.0, hours=1)]))
    assert (changed.commit.number, changed.superseded, len(store.state("sales").files)) == (2, 1, 2)
    assert opened(store.root).scan().to_arrow().num_rows == 3


def test_rows_that_contradict_each_other_are_named(store: OfflineStore, tmp_path: Path) -> None:
    rows = [row(0), row(1, 1.0), row(1, 2.0), row(2)]
    with pytest.raises(StepError, match=f"different rows for the same record and event time.*{record_id(1)}"):
        ingest_rows(store, write_rows(tmp_path, rows, parts=2))
    assert store.commits("sales") == []
    equal = ingest_rows(store, write_rows(tmp_path, [row(0), row(1), row(1)]))
    assert (equal.added, equal.unchanged, equal.commit.live_rows) == (2, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop("ROOMS"), r"lacks the columns \['ROOMS'\]"),
        (lambda f: f.cast({"ROOMS": pl.Float64}), "ROOMS is Float64, not Int64"),
        (lambda f: f.with_columns(event_time=pl.lit(None, pl.Datetime("us", "UTC"))), "3 of 3 rows without event_time"),
        (lambda f: f.with_columns(record_id=pl.lit(None, pl.String)), "3 of 3 rows without record_id"),
        (lambda f: f[:0], "has no rows"),
    ],
)  # fmt: skip
def test_a_dataset_of_another_form_is_refused(
    store: OfflineStore, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    dataset = write_frame(tmp_path, change(rows_frame([row(n) for n in range(3)])))
    with pytest.raises(StepError, match=message):
        ingest_rows(store, dataset)
    other = TABLE.model_copy(update={"columns": TABLE.columns[:1] + TABLE.columns[2:]})
    store.ensure_group("sales", other)  # a group without commits takes another schema


# --- schema --------------------------------------------------------------------------------------------------------

EXTRA = ColumnSpec(name="EXTRA", dtype="float64", nullable=True)


def _with(*columns: ColumnSpec, **changes: Any) -> TableSpec:
    return TABLE.model_copy(update={"columns": columns, **changes})


def test_a_new_column_that_may_be_empty_is_adopted(store: OfflineStore, tmp_path: Path) -> None:
    rows = [row(n) for n in range(3)]
    ingest_rows(store, write_rows(tmp_path, rows))
    wider = _with(EXTRA, *TABLE.columns)
    frame = rows_frame(rows).with_columns(EXTRA=pl.lit(None, pl.Float64))
    store.ensure_group("sales", wider)
    empty = ingest_rows(store, write_frame(tmp_path, frame), table=wider)
    assert (empty.unchanged, empty.commit.number) == (3, 2)
    assert empty.commit.live_digest == store.commits("sales", 1)[-1].live_digest
    filled = frame.with_columns(EXTRA=pl.Series([0.0, None, 0.5]), event_time=NOON + timedelta(hours=1))
    changed = ingest_rows(store, write_frame(tmp_path, filled.cast(frame.schema)), table=wider)
    assert (changed.unchanged, changed.superseded) == (1, 2)
    read = scan(store).collect().sort("PRICE")
    assert read.columns == ["record_id", "event_time", "EXTRA", "PRICE", "ROOMS", "SOLD"]
    assert sorted(read["EXTRA"].to_list(), key=str) == [0.0, 0.5, None]
    assert scan(store, commit=1).collect().columns[2:] == ["PRICE", "ROOMS", "SOLD"]
    assert store.get_record("sales", record_id(1)) is not None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_with(*TABLE.columns[:2]), "SOLD is missing"),
        (_with(*TABLE.columns, EXTRA.model_copy(update={"nullable": False})), "EXTRA is new and must not be empty"),
        (_with(*TABLE.columns[:2], ColumnSpec(name="SOLD", dtype="int64")), "SOLD is int64, stored as bool"),
        (_with(TABLE.columns[0], ColumnSpec(name="ROOMS", dtype="int64"), TABLE.columns[2]), "ROOMS must not be empty"),
        (_with(*TABLE.columns, key_columns=("ROOMS",)), r"key columns are \['ROOMS'\], were \[\]"),
        (_with(*TABLE.columns, ColumnSpec(name="is_deleted", dtype="bool", nullable=True)), r"\['is_deleted'\] itself"),
    ],
)
def test_other_schema_changes_are_refused(store: OfflineStore, tmp_path: Path, table: TableSpec, message: str) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    with pytest.raises(StepError, match=message):
        store.ensure_group("sales", table)
    with pytest.raises(StepError, match=message):
        ingest_rows(store, write_rows(tmp_path, [row(1)]), table=table)
    assert len(store.commits("sales")) == 1


# --- crashes, races, damage ----------------------------------------------------------------------------------------


def _group(store: OfflineStore) -> LocalGroup:
    folder = store.folder("sales")
    assert isinstance(folder, LocalGroup)
    return folder


def _data_files(store: OfflineStore) -> set[str]:
    return {uri.rpartition("/")[2] for uri in _parquet_files(store)}


def test_a_failure_before_the_commit_changes_and_leaves_nothing(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    before = _data_files(store), records(scan(store))

    def run(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Any:
        if function.__name__ == "read_back":
            assert len(_data_files(store)) == 2
            assert records(scan(store)) == before[1]
            raise KeyboardInterrupt
        return run_here(function, calls)

    with pytest.raises(KeyboardInterrupt):
        ingest_rows(store, write_rows(tmp_path, [row(1)]), run=run)
    assert (_data_files(store), records(scan(store))) == before
    assert sorted(p.name for p in _group(store).path.iterdir()) == ["catalog.db", "data", "group.json", "metadata"]


KILLED = """
import os, sys, signal
from pathlib import Path
from step_scripts.feature_store.offline_store import OfflineStore
from tests.feature_rows import ingest_rows, row, run_here, write_rows

def run(function, calls):
    results = list(run_here(function, calls))
    if function.__name__ == "write_files":
        print("written", flush=True)
        signal.pause()
    return results

ingest_rows(OfflineStore(sys.argv[1]), write_rows(Path(sys.argv[2]), [row(1), row(2, hours=24)]), run=run)
"""


def test_a_killed_ingestion_is_invisible_and_the_next_one_tidies_up(
    store: OfflineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    before = _data_files(store)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, store.root, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        with monkeypatch.context() as impatient:
            impatient.setattr(group_places, "LOCK_SECONDS", 0.1)
            with pytest.raises(StepError, match="being written to by another run"):
                ingest_rows(store, write_rows(tmp_path, [row(3)]))
        assert set(records(scan(store))) == {record_id(0)}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close() if process.stdout else None
    assert len(_data_files(store) - before) == 2
    assert set(records(scan(store))) == {record_id(0)}
    assert store.get_record("sales", record_id(1)) is None
    after = ingest_rows(store, write_rows(tmp_path, [row(1)]))
    assert (after.orphan_files_deleted, after.added) == (2, 1)
    assert len(_data_files(store)) == 2


def test_ingestions_at_the_same_time_all_land(store: OfflineStore, tmp_path: Path) -> None:
    datasets = [write_rows(tmp_path, [row(10 * k + n) for n in range(10)]) for k in range(6)]
    threads = [threading.Thread(target=ingest_rows, args=(store, d)) for d in datasets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.number for c in store.commits("sales")] == [1, 2, 3, 4, 5, 6]
    assert set(records(scan(store))) == {record_id(n) for n in range(60)}
    assert store.commits("sales")[-1].live_rows == 60


def test_a_stale_writer_cannot_commit(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    folder = store.folder("sales")
    state = folder.state()
    with folder.attempt(state, TABLE) as stale:
        commit = ingest_rows(store, write_rows(tmp_path, [row(1)])).commit
        with pytest.raises(CommitTaken, match="another writer has made commit 2"):
            folder.append(stale, commit.model_copy(update={"live_rows": 99}), [file.path for file in state.files])
    assert folder.state().last == commit
    assert set(records(scan(store))) == {record_id(0), record_id(1)}


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:100])])
def test_rows_that_cannot_be_read_back_are_named_and_not_committed(
    store: OfflineStore, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))

    def run(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Any:
        if function.__name__ == "read_back":
            damage(next((_group(store).data).rglob("event_time_day=2024-05-02/*.parquet")))
        return run_here(function, calls)

    rows = [row(0), *(row(n, hours=24) for n in range(1, 31)), row(99, hours=48)]
    with pytest.raises(StepError, match="31 rows written to feature group sales, 1 can be read back") as caught:
        ingest_rows(store, write_rows(tmp_path, rows), run=run)
    lost = sorted(record_id(n) for n in range(1, 31))
    assert caught.value.details == {"rows_in": 32, "records_missing": 30, "missing_record_ids": lost[:20]}
    assert f"{lost[0]}, {lost[1]}" in str(caught.value)
    assert len(store.commits("sales")) == 1
    assert len(_data_files(store)) == 1


def test_a_file_with_other_rows_than_planned_is_not_committed(store: OfflineStore, tmp_path: Path) -> None:
    def run(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Any:
        if function.__name__ == "read_back":
            (path,) = _group(store).data.rglob("*.parquet")
            frame = pl.read_parquet(path)
            frame.with_columns(PRICE=frame["PRICE"].reverse()).write_parquet(path)
        return run_here(function, calls)

    with pytest.raises(StepError, match="3 can be read back but not as they were"):
        ingest_rows(store, write_rows(tmp_path, [row(n, float(n)) for n in range(3)]), run=run)
    assert store.commits("sales") == []


def test_a_lost_file_is_found_by_readers_and_by_the_next_ingestion(store: OfflineStore, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, [row(0), row(1, hours=24)])
    ingest_rows(store, dataset)
    assert store.find_ingestion("sales", dataset.digest) is not None
    lost = next(_group(store).data.rglob("event_time_day=2024-05-02/*.parquet"))
    lost.unlink()
    assert store.find_ingestion("sales", dataset.digest) is None
    for attempt in (lambda: store.get_record("sales", record_id(0)), lambda: ingest_rows(store, dataset)):
        with pytest.raises(StepError, match=f"1 of 2 files.*{lost.name}"):
            attempt()
    with pytest.raises(StepError, match=f"1 record of the dataset cannot be read: {record_id(1)}"):
        ingest_rows(store, dataset)


def test_a_file_whose_bytes_changed_is_found_by_the_next_ingestion(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    (path,) = _group(store).data.rglob("*.parquet")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StepError, match=f"{path.name} cannot be read"):
        ingest_rows(store, write_rows(tmp_path, [row(1)]))


def test_a_lost_manifest_is_found_by_readers(store: OfflineStore, tmp_path: Path) -> None:
    for number in range(2):
        ingest_rows(store, write_rows(tmp_path, [row(number)]))
    next(_group(store).metadata.glob("*-m0.avro")).unlink()
    with pytest.raises(StepError, match=r"the table of the feature group at .* cannot be read"):
        store.get_record("sales", record_id(0))


# --- groups and records --------------------------------------------------------------------------------------------


def test_groups_are_separate_and_can_be_deleted(store: OfflineStore, tmp_path: Path) -> None:
    assert store.groups() == []
    for name in ("one", "two"):
        ingest_rows(store, write_rows(tmp_path, [row(0)]), group=name)
    assert store.groups() == ["one", "two"]
    store.delete_group("one")
    assert store.groups() == ["two"]
    assert not [uri for uri in storage.list_files(store.root) if "/two/" not in uri and not uri.endswith("/.two.lock")]
    with pytest.raises(StepError, match=r"there is no feature group one.*\['two'\]"):
        store.state("one")
    assert ingest_rows(store, write_rows(tmp_path, [row(1)]), group="one").commit.number == 1


def test_deleting_waits_for_the_writer_and_a_waiting_writer_starts_anew(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    waiting = prepared_ingestion(store, write_rows(tmp_path, [row(1)]))
    with store.folder("sales").lock():
        writer = threading.Thread(target=waiting.ingest)
        writer.start()
        store.folder("sales").remove()
    writer.join()
    assert set(records(scan(store))) == {record_id(1)}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-a", "a" * 65, "a b"])
def test_names_that_are_no_group_names_are_refused(store: OfflineStore, name: str) -> None:
    with pytest.raises(StepError, match="is no name of a feature group"):
        store.folder(name)


def test_deleting_a_record(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0), row(1)]))
    moment = NOON + timedelta(hours=1)
    assert not store.delete_record("sales", record_id(5), moment)
    assert not store.delete_record("sales", record_id(0), NOON - timedelta(hours=1))
    assert store.delete_record("sales", record_id(0), moment.replace(tzinfo=None))
    assert not store.delete_record("sales", record_id(0), moment)
    assert store.get_record("sales", record_id(0)) is None
    assert set(records(scan(store))) == {record_id(1)}
    assert set(records(scan(store, as_of=NOON))) == {record_id(0), record_id(1)}
    state = store.state("sales")
    assert (state.commits[-1].live_rows, sum(f.rows or 0 for f in state.files), len(state.commits)) == (1, 3, 2)
    assert max(last for _, last in state.event_times) == moment


def test_snapshots_differ_by_what_they_hold(store: OfflineStore, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0), row(1, hours=24), row(2, hours=24.5)]))
    state = store.state("sales")
    now = state.artifact()
    assert (now.rows, state.commits[-1].deduplicate, len(state.commits)) == (3, False, 1)
    assert state.artifact(NOON + timedelta(hours=30)) == now
    early = state.artifact(NOON + timedelta(hours=24))
    assert (early.rows, early.digest == now.digest) == (None, False)
    assert len(early.files) == 2
    assert len(state.artifact(NOON.replace(tzinfo=None)).files) == 1
    assert len(records(scan(store, as_of=NOON + timedelta(hours=24)))) == 2


# --- division of work ----------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.tuples(st.integers(0, 5), st.integers(-3, 3)), st.integers(1, 10), min_size=1),
    st.integers(10, 30),
)
def test_work_is_divided_without_loss(counts: dict[tuple[int, int], int], most: int) -> None:
    pieces = list(divided([(day, source, rows) for (day, source), rows in sorted(counts.items())], most))
    covered = [
        (day, source)
        for days, _ in pieces
        for source, (first, last) in days.items()
        for day in range(first, last + 1)
        if (day, source) in counts
    ]
    assert sorted(covered) == sorted(counts)
    assert all(rows <= most for _, rows in pieces)
    assert sum(rows for _, rows in pieces) == sum(counts.values())
