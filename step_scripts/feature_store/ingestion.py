"""Ingestion of a dataset into a feature group: compare, write, read back, commit.

The pieces run wherever the caller has them run; this module divides the work and commits once, last. What fails or is
killed before has changed nothing for readers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import polars as pl

from step_scripts.feature_store.commits import Commit, GroupState, StoredFile, digest_of, ingested_by
from step_scripts.feature_store.comparison import SHOWN, Changes, compare_partition, hash_source, partition_count
from step_scripts.feature_store.data_files import WriteItem, WriteTarget, read_back, write_files
from step_scripts.feature_store.events import (
    Source,
    file_types,
    grouped,
    read_source,
    validate_schema_change,
)
from step_scripts.feature_store.group import LOCK_SECONDS, Group
from step_scripts.feature_store.iceberg_table import retry_on_commit_conflict
from step_scripts.feature_store.online_store import OnlineTarget, ParallelRun, bring_online
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, Reporter, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.hashes import add_sums, subtract_sums
from step_scripts.table.spec import TableSpec

_PIECE_ROWS = (1 << 17, 1 << 20)  # fewest and most rows of a piece: a worker holds one piece, about 0.4 kB a row
_FILES_READ_AT_ONCE = 64
STORED_COUNTS = ("added", "unchanged", "superseded", "deleted")


@dataclass(frozen=True, kw_only=True)
class IngestionResult(Changes):
    """What an ingestion has changed, and the group after it.

    `stored`: the files that it has added. `already_ingested`: the group held this dataset, and its latest commit is
    that of an earlier ingestion.
    """

    state: GroupState
    rows_in: int
    rows_readable: int
    stored: tuple[StoredFile, ...] = ()
    written_online: int = 0
    orphan_files_deleted: int = 0
    already_ingested: bool = False

    @property
    def commit(self) -> Commit:
        """The group's latest commit."""
        return self.state.commits[-1]

    @property
    def day_partitions(self) -> int:
        """How many days of event times have new files."""
        return len({file.path.partition("/")[0] for file in self.stored})


@dataclass(frozen=True)
class Ingestion:
    """Ingest `dataset` (columns record_id, event_time and those of `table`) into a group, which may not be there yet.

    With `mirror`, the group's live records become those of the dataset: others are deleted. `run` runs the pieces,
    `workers` at the same time. `lock_seconds`: how long to wait for other writers. With `online`, the latest event of
    every record that changes goes to the online store before the commit; the ids of those that do not arrive are
    written to `missing_uri`. `confirm` is called before anything becomes visible, `phase` gives the context of each
    phase.
    """

    group: Group
    table: TableSpec
    dataset: Artifact
    run: ParallelRun
    log: Reporter
    mirror: bool = False
    workers: int = 1
    lock_seconds: float = LOCK_SECONDS
    online: OnlineTarget | None = None
    missing_uri: str | None = None
    phase: Callable[[str], AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
    confirm: Callable[[], None] = lambda: None

    def ingest(self) -> IngestionResult:
        """A dataset that is known already makes no commit, one that is not makes one even if it changes nothing.

        Where writers cannot keep each other out, one that was overtaken compares again with what the other has stored.

        Raises `StepError`, having changed nothing, if the schema does not fit the group's, rows contradict each other,
        files of the group are missing, a row cannot be read back, or others hold the lock for too long.
        """
        with contextlib.ExitStack() as stack:
            with self.phase("wait for the lock"):
                stack.enter_context(self.group.lock(self.lock_seconds, create=True))
            self.group.info()  # raises for another format, whose files would be taken for orphans
            if deleted := self.group.delete_orphan_files():
                self.log.info(f"deleted what an earlier, unfinished ingestion has left: {counted(deleted, 'file')}")
            result = retry_on_commit_conflict(self._attempt, self.log.info)
        return replace(result, orphan_files_deleted=deleted)

    def _attempt(self) -> IngestionResult:
        """Ingest into the group as it is now. Raises `CommitTaken` if another writer commits first."""
        group, table = self.group, self.table
        files = [f for f in self.dataset.files if f.path.endswith(".parquet")]
        inputs = self._pieces([(storage.join(self.dataset.uri, f.path), f.rows or 0) for f in files])
        rows = sum(source.rows for source in inputs)
        if not rows:
            raise StepError(f"the dataset {self.dataset.uri} has no rows, so there is nothing to ingest")
        state = group.state()
        has_new_columns = validate_schema_change(group.name, state.last.table if state.last else None, table)
        if state.last is None:
            group.create(table)
            state = group.state()
        lost, sentence = state.lost_files()
        if lost:
            raise self._unreadable(
                sentence,
                [file.path for file in state.files if file not in lost],
                "restore them from a backup, or delete the group and ingest its sources again",
            )
        if not has_new_columns and ingested_by(state.commits, self.dataset.digest, mirror=self.mirror):
            self.log.info(f"feature group {group.name} holds this dataset already")
            return IngestionResult(state=state, rows_in=rows, rows_readable=rows, unchanged=rows, already_ingested=True)
        with group.staging() as scratch, group.attempt(state, table) as attempt:
            with self.phase("compare"):
                found, items = self._compare(inputs, state, attempt.target, scratch)
            with self.phase("write"):
                calls = [(item, attempt.target) for item in items]
                written = self._all(write_files, calls, "rows written", [item.rows for item in items])
            paths = sorted(path for part in written for path in part)
            count = sum(item.rows for item in items)
            with self.phase("read back"):
                self._read_back(attempt.target, paths, found, count, state)
            self.confirm()
            if self.online is not None:
                before = f"its latest commit is still {len(state.commits)}" if state.commits else "it has no commit"
                with self.phase("write online"):
                    bring_online(
                        self.run,
                        items,
                        table,
                        self.online,
                        found.latest,
                        self.log,
                        offline=f"the offline store is as before: {before}",
                        missing_uri=self.missing_uri,
                    )
            with self.phase("commit"):
                commit = group.append(attempt, self._commit(state, found, attempt.target), paths)
        after, new = group.state(commit.number), set(paths)
        return IngestionResult(
            **vars(found),
            state=after,
            rows_in=rows,
            rows_readable=count - found.deleted + found.unchanged,
            stored=tuple(file for file in after.files if file.path in new),
            written_online=found.latest if self.online else 0,
        )

    def _commit(self, state: GroupState, found: Changes, target: WriteTarget) -> Commit:
        last = state.last
        live = add_sums(last.live_sums if last else (0, 0), found.live_added)
        return Commit(
            number=len(state.commits) + 1,
            created_at=target.write_time,
            write_time=target.write_time,
            dataset_digest=self.dataset.digest,
            table=self.table,
            **{name: getattr(found, name) for name in STORED_COUNTS},
            live_rows=(last.live_rows if last else 0) + found.live_rows,
            live_digest=digest_of(subtract_sums(live, found.live_removed)),
            mirrors=self.mirror or not state.files,
            deduplicate=found.further_events > 0 or bool(last and last.deduplicate),
        )

    def _compare(
        self, inputs: list[Source], state: GroupState, target: WriteTarget, scratch: str
    ) -> tuple[Changes, list[WriteItem]]:
        """What the dataset changes, and what is to be written."""
        rows_in, stored_rows = sum(source.rows for source in inputs), sum(file.rows for file in state.files)
        # A small dataset is compared with the events of its own records only.
        known_only = not self.mirror and rows_in * 4 < stored_rows
        partitions = partition_count(rows_in + (rows_in if known_only else stored_rows))
        calls = [(source, self.table, partitions, scratch, False) for source in inputs]
        times = self._all(hash_source, calls, "rows read", [source.rows for source in inputs])
        files = [(storage.join(state.data_uri, file.path), file.rows) for file in state.files]
        stored = self._pieces(files, len(inputs), file_types(target.schema))
        calls = [(source, self.table, partitions, scratch, known_only) for source in stored]
        self._all(hash_source, calls, "stored rows compared", [source.rows for source in stored])
        mirror_time = max(times) if self.mirror else None
        compared = self._all(compare_partition, [(n, scratch, mirror_time) for n in range(partitions)])
        found = sum((changes for changes, _ in compared), Changes())
        sources = [*inputs, *stored]
        if found.conflicts:
            raise self._contradiction(found, sources)
        counts = pl.concat(rows for _, rows in compared).group_by("day", "source").agg(pl.col("rows").sum())
        most = self._piece_rows(int(counts["rows"].sum()))
        items = [
            WriteItem(tuple((sources[n], first, last) for n, (first, last) in days.items()), scratch, rows)
            for days, rows in divided(counts.sort("day", "source").rows(), most)
        ]
        return found, items

    def _read_back(self, target: WriteTarget, written: list[str], found: Changes, rows: int, state: GroupState) -> None:
        """Raise `StepError` unless the written files hold exactly the events to store."""
        a_piece = len(written) * self._piece_rows(rows) // max(rows, 1)
        size = max(1, min(_FILES_READ_AT_ONCE, a_piece, -(-len(written) // self.workers)))
        read = self._all(read_back, [(written[at : at + size], target) for at in range(0, len(written), size)])
        readable = [file for files, _ in read for file in files]
        count = sum(held for _, held in readable)
        if count != rows or add_sums(*(sums for _, sums in read)) != found.stored_sums:
            raise self._unreadable(
                f"{counted(rows, 'row')} written to feature group {self.group.name}, {count:,} can be read back"
                + (" but not as they were" if count == rows else ""),
                [*(file.path for file in state.files), *(path for path, _ in readable)],
                "nothing was committed; check the storage, then ingest again",
            )

    def _unreadable(self, what: str, readable: list[str], remedy: str) -> StepError:
        """The error for rows that cannot be read, with the records of the dataset that are in no readable file."""
        incoming = pl.concat(_record_ids(uri) for uri in self.dataset.file_uris(".parquet"))
        stored = [_record_ids(storage.join(self.group.data_uri, path)) for path in readable]
        lost = incoming.unique().join(pl.concat([incoming.clear(), *stored]), on="record_id", how="anti")
        shown = lost["record_id"].sort().head(SHOWN).to_list()
        records = counted(lost.height, "record")
        named = f"; {records} of the dataset cannot be read: {', '.join(shown)}" if shown else ""
        more = " and others" if lost.height > len(shown) else ""
        details: dict[str, Any] = {"rows_in": incoming.height, "records_missing": lost.height}
        details["missing_record_ids"] = shown
        return StepError(f"{what}{named}{more}. Remedy: {remedy}", details=details)

    def _contradiction(self, found: Changes, sources: Sequence[Source]) -> StepError:
        places = found.conflicts[:SHOWN]
        ids = {read_source(sources[n], ["record_id"], self.table)["record_id"][row] for n, row in places}
        return StepError(
            f"the dataset has different rows for the same record and event time, so that none of them is the latest: "
            f"record ids {', '.join(sorted(ids))}{' and maybe others' if len(places) == SHOWN else ''}. "
            "Remedy: remove all but one, or give the table an event time column that tells them apart",
            details={"record_ids": sorted(ids)},
        )

    def _pieces(
        self, files: Sequence[tuple[str, int]], first_index: int = 0, stored: Mapping[str, Any] | None = None
    ) -> list[Source]:
        return grouped(files, self._piece_rows(sum(rows for _, rows in files)), first_index, stored)

    def _piece_rows(self, rows: int) -> int:
        """Rows of a piece, so that all workers have one and none has too much to hold."""
        fewest, most = _PIECE_ROWS
        return max(fewest, min(most, -(-rows // self.workers)))

    def _all(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], what: str = "", rows: Sequence[int] = ()
    ) -> list[Any]:
        """Results of all calls, in order; reports how many of the `rows` of the calls are done."""
        results: dict[int, Any] = {}
        for index, result in self.run(function, calls):
            results[index] = result
            if what:
                self.log.info(f"{sum(rows[n] for n in results):,} of {sum(rows):,} {what}")
        return [results[n] for n in range(len(calls))]


def divided(counts: Sequence[tuple[int, int, int]], most_rows: int) -> Iterator[tuple[dict[int, tuple[int, int]], int]]:
    """Divide rows, counted as (day, source, rows) and sorted, into pieces: first and last day by source, and rows.

    A piece has at most `most_rows` rows or is one day of one source. A day is divided only if it has more rows than
    that, so that there are as few files as the layout allows.
    """
    days: dict[int, tuple[int, int]] = {}
    held = 0
    for day, of_day in groupby(counts, key=lambda count: count[0]):
        sources = [(source, rows) for _, source, rows in of_day]
        whole = sum(rows for _, rows in sources) <= most_rows
        for part in [sources] if whole else [[one] for one in sources]:
            rows = sum(count for _, count in part)
            if days and held + rows > most_rows:
                yield days, held
                days, held = {}, 0
            held += rows
            for source, _ in part:
                days[source] = (days[source][0] if source in days else day, day)
    if days:
        yield days, held


def _record_ids(uri: str) -> pl.DataFrame:
    with storage.open_input(uri) as file:
        return pl.read_parquet(file, columns=["record_id"])
