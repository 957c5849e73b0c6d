"""Ingestion of a dataset into a feature group: compare, write, read back, commit.

The pieces (`step_scripts.feature_store.feature_files`) run wherever the caller has them run; this module plans them and
commits once, last. What fails or is killed before has changed nothing for readers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from step_scripts.feature_store.event_sources import dataset_sources, read_source, stored_sources
from step_scripts.feature_store.event_timeline import Changes
from step_scripts.feature_store.feature_files import (
    SHOWN,
    attempt_token,
    compare_bucket,
    hash_source,
    read_back,
    write_files,
)
from step_scripts.feature_store.first_ingestion import all_added, records_differ, summarize_source
from step_scripts.feature_store.group import (
    LOCK_SECONDS,
    Commit,
    Group,
    GroupState,
    StoredFile,
    digest_of,
    until_committed,
)
from step_scripts.feature_store.group_schema import adopts, check_columns
from step_scripts.feature_store.ingestion_plan import (
    BUCKET_EVENTS,
    Selection,
    WriteItem,
    WriteTarget,
    bucket_count,
    piece_rows,
    write_groups,
)
from step_scripts.feature_store.online_ingestion import bring_online
from step_scripts.feature_store.online_store import OnlineTarget
from step_scripts.feature_store.stored_types import file_types
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, Reporter, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.hashes import add_sums, subtract_sums
from step_scripts.table.spec import TableSpec

# Runs `function(*call)` for each call, in any order and anywhere; yields (index of the call, result).
ParallelRun = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]

# What changes, the rows to store of each source, how many of each (source, day), their digest, how many are latest.
_Comparison = tuple[Changes, dict[int, list[Selection]], list[tuple[int, int, int]], tuple[int, int], int]

_FILES_READ_AT_ONCE = 64
_COUNTS = ("added", "unchanged", "superseded", "deleted")


@dataclass(frozen=True)
class IngestionResult:
    """The group's latest commit after an ingestion, and what the ingestion changed.

    `committed`: whether this ingestion made that commit. `files`: all of the group, `stored`: those that it has added.
    `outdated`: rows that are older than what is stored.
    """

    commit: Commit
    committed: bool
    files: tuple[StoredFile, ...]
    rows_in: int
    rows_readable: int
    added: int = 0
    unchanged: int = 0
    superseded: int = 0
    deleted: int = 0
    outdated: int = 0
    stored: tuple[StoredFile, ...] = ()
    day_partitions: int = 0
    written_online: int = 0
    strays_removed: int = 0
    already_ingested: bool = False


def ingested_by(commits: Sequence[Commit], dataset_digest: str, *, mirror: bool) -> Commit | None:
    """The commit that ingested a dataset, if to ingest it again would change nothing.

    With `mirror`, only if it is the last one and left no other records; otherwise later commits may have added some.
    """
    if mirror:
        last = commits[-1] if commits else None
        return last if last and last.mirrors and last.dataset_digest == dataset_digest else None
    for commit in reversed(commits):
        if commit.dataset_digest == dataset_digest:
            return commit
        if commit.superseded or commit.deleted:
            return None
    return None


def ingest(
    folder: Group,
    table: TableSpec,
    dataset: Artifact,
    run: ParallelRun,
    log: Reporter,
    *,
    mirror: bool = False,
    workers: int = 1,
    lock_seconds: float = LOCK_SECONDS,
    online: OnlineTarget | None = None,
    missing_uri: str | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = contextlib.nullcontext,
    confirm: Callable[[], None] = lambda: None,
) -> IngestionResult:
    """Ingest `dataset` (columns record_id, event_time and those of `table`); the group is made if there is none.

    With `mirror`, the group's live records become those of the dataset: others are deleted. A dataset that is known
    already makes no commit, one that is not makes one even if it changes nothing. Where writers cannot keep each other
    out, one that was overtaken compares again with what the other has stored. With `online`, the latest event of every
    record that changes goes to the online store before the commit; the ids of those that do not arrive are written to
    `missing_uri`. `confirm` is called before anything becomes visible.

    Raises `StepError`, having changed nothing, if the schema does not fit the group's, rows contradict each other,
    files of the group are missing, a row cannot be read back, or others hold the lock for `lock_seconds`.
    """
    check_columns(folder.name, table)
    with contextlib.ExitStack() as stack:
        with phase("wait for the lock"):
            stack.enter_context(folder.lock(lock_seconds, create=True))
        folder.info()  # raises for another format, whose files would be taken for strays
        if (strays := folder.remove_strays()) > 0:
            log.info(f"removed what an earlier, unfinished ingestion has left: {counted(strays, 'file')}")

        def attempt() -> IngestionResult:
            state = folder.state()
            new_columns = state.last is not None and adopts(folder.name, state.last.table, table)
            if state.last is None:
                folder.create(table)
                state = folder.state()
            ingestion = _Ingestion(
                folder, state, table, dataset, run, log, mirror, workers, online, missing_uri, phase, confirm
            )
            try:
                return ingestion.result(new_columns)
            except BaseException:
                with contextlib.suppress(StepError, OSError):  # a later ingestion removes them too
                    folder.remove_attempt(ingestion.token)
                raise

        result = until_committed(attempt, lambda reason: log.info(f"{reason}: comparing again"))
    return replace(result, strays_removed=strays)


class _Ingestion:
    def __init__(
        self, folder: Group, state: GroupState, table: TableSpec, dataset: Artifact, run: ParallelRun, log: Reporter,
        mirror: bool, workers: int, online: OnlineTarget | None, missing_uri: str | None,
        phase: Callable[[str], AbstractContextManager[None]], confirm: Callable[[], None],
    ) -> None:  # fmt: skip
        self.folder, self.table, self.dataset, self.log, self.mirror = folder, table, dataset, log, mirror
        self.phase, self.workers, self.online, self.confirm = phase, workers, online, confirm
        self.missing_uri = missing_uri
        self.token = attempt_token()
        self._run = run
        self.state, self.commits, self.stored_files = state, state.commits, state.files
        self.inputs = dataset_sources(dataset, piece_rows(dataset.rows or 0, workers))
        self.rows_in = sum(s.rows for s in self.inputs)
        if not self.rows_in:
            raise StepError(f"the dataset {dataset.uri} has no rows, so there is nothing to ingest")

    def result(self, new_columns: bool) -> IngestionResult:
        files = self.stored_files
        if missing := self.folder.missing_files(files):
            raise self._unreadable(
                f"{len(missing)} of {counted(len(files), 'file')} of feature group {self.folder.name} missing or cut "
                f"off, the first is {storage.join(self.folder.data_uri, missing[0].path)}",
                [f.path for f in files if f not in missing],
                "restore them from a backup, or delete the group and ingest its sources again",
            )
        last = self.state.last
        if last and not new_columns and ingested_by(self.commits, self.dataset.digest, mirror=self.mirror):
            self.log.info(f"feature group {self.folder.name} holds this dataset already")
            rows = self.rows_in
            return IngestionResult(last, False, tuple(files), rows, rows, unchanged=rows, already_ingested=True)
        with self.folder.staging() as scratch:
            with self.phase("compare"):
                found, selections, histogram, expected, latest = self._compare(scratch)
            counts = {
                name: getattr(found, name) for name in ("added", "unchanged", "superseded", "deleted", "outdated")
            }
            now = datetime.now(UTC)
            write_time = max(now, last.write_time + timedelta(microseconds=1)) if last else now
            writing = self.folder.begin(self.state, self.table)
            target = WriteTarget(
                self.folder.data_uri, self.table, write_time, self.token, writing.schema, writing.partition
            )
            with self.phase("write"):
                items = self._write_items(selections, histogram)
                written = self._write(target, items)
            with self.phase("read back"):
                stored = self._read_back(target, written, expected, sum(rows for _, rows in items))
            self.confirm()
            if self.online is not None:
                with self.phase("write online"):
                    before = f"its latest commit is still {last.number}" if last else "it has no commit"
                    bring_online(
                        self._run,
                        [item for item, _ in items],
                        self.table,
                        self.online,
                        latest,
                        self.log,
                        scratch=scratch,
                        offline=f"the offline store is as before: {before}",
                        missing_uri=self.missing_uri,
                    )
        commit = Commit(
            number=len(self.commits) + 1,
            created_at=now,
            write_time=write_time,
            dataset_digest=self.dataset.digest,
            table=self.table,
            **{name: counts[name] for name in _COUNTS},
            live_rows=(last.live_rows if last else 0) + found.live_rows,
            live_digest=self._live_digest(last, found),
            mirrors=self.mirror or not files,
            deduplicate=found.deduplicate or bool(last and last.deduplicate),
        )
        with self.phase("commit"):
            commit = self.folder.append(writing, commit, stored, self.token)
        readable = sum(f.rows for f in stored) - found.deleted + found.unchanged
        return IngestionResult(
            commit,
            True,
            (*files, *stored),
            self.rows_in,
            readable,
            stored=tuple(stored),
            day_partitions=len({day for _, day, _ in histogram}),
            written_online=latest if self.online else 0,
            **counts,
        )

    def _compare(self, scratch: str) -> _Comparison:
        if not self.stored_files and (first := self._compare_with_nothing(scratch)) is not None:
            return first
        stored_rows = sum(f.rows for f in self.stored_files)
        filtered = not self.mirror and self.rows_in < min(stored_rows // 4, BUCKET_EVENTS)
        buckets = bucket_count(self.rows_in + (self.rows_in if filtered else stored_rows))
        calls = [(source, self.table, buckets, scratch, None) for source in self.inputs]
        incoming = self._all(hash_source, calls, "rows read", [s.rows for s in self.inputs])
        paths = [(storage.join(self.folder.data_uri, f.path), f.rows) for f in self.stored_files]
        types = file_types(self.folder.begin(self.state, self.table).schema)
        pieces = stored_sources(len(self.inputs), paths, piece_rows(stored_rows, self.workers), types)
        self.sources = self.inputs + pieces
        old = self.sources[len(self.inputs) :]
        calls = [(source, self.table, buckets, scratch, incoming if filtered else None) for source in old]
        stored = self._all(hash_source, calls, "stored rows compared", [s.rows for s in old])
        new_hashes = list(enumerate(incoming))
        old_hashes = [(s.index, h) for s, h in zip(old, stored, strict=True)]
        latest = max(h.last_time for h in incoming if h.last_time is not None)
        calls = [(n, new_hashes, old_hashes, scratch, latest if self.mirror else None) for n in range(buckets)]
        found, expected, latest_events = Changes(), (0, 0), 0
        selections: dict[int, list[Selection]] = {}
        histogram: list[tuple[int, int, int]] = []
        for changes_, selected, days, sums, count in self._all(compare_bucket, calls):
            found = found.merge(changes_)
            latest_events += count
            histogram += days
            expected = add_sums(expected, sums)
            for selection in selected:
                selections.setdefault(selection.source, []).append(selection)
        if found.conflicts:
            raise self._contradiction(found)
        return found, selections, histogram, expected, latest_events

    def _compare_with_nothing(self, scratch: str) -> _Comparison | None:
        """All rows are news, if every record occurs once; otherwise None."""
        buckets = bucket_count(self.rows_in)
        calls = [(source, self.table, buckets, scratch) for source in self.inputs]
        summaries = self._all(summarize_source, calls, "rows read", [s.rows for s in self.inputs])
        if not all(self._all(records_differ, [(bucket, summaries) for bucket in range(buckets)])):
            return None
        self.sources = self.inputs
        found = all_added(summaries)
        histogram = [(s.index, *counted) for s, of in zip(self.inputs, summaries, strict=True) for counted in of.days]
        return found, {s.index: [] for s in self.inputs}, histogram, found.live_added, self.rows_in

    def _write_items(
        self, selections: dict[int, list[Selection]], histogram: list[tuple[int, int, int]]
    ) -> list[tuple[WriteItem, int]]:
        """Pieces to write, and how many events each has."""
        total = sum(count for *_, count in histogram)
        items = []
        for number, (first_day, last_day, sources, count) in enumerate(
            write_groups(histogram, piece_rows(total, self.workers))
        ):
            chosen = tuple((self.sources[n], tuple(selections[n])) for n in sources)
            items.append((WriteItem(number, first_day, last_day, chosen), count))
        return items

    def _write(self, target: WriteTarget, items: list[tuple[WriteItem, int]]) -> list[str]:
        calls = [(item, target) for item, _ in items]
        found = self._all(write_files, calls, "rows written", [rows for _, rows in items])
        return [path for paths in found for path in paths]

    def _read_back(
        self, target: WriteTarget, written: list[str], expected: tuple[int, int], rows: int
    ) -> list[StoredFile]:
        """Prove that the written files hold exactly the events to store. Raises `StepError` if they do not."""
        wanted = len(written) * piece_rows(rows, self.workers) // max(rows, 1)
        size = max(1, min(_FILES_READ_AT_ONCE, wanted, -(-len(written) // self.workers)))
        calls = [
            (target.data, written[at : at + size], self.table, target.schema) for at in range(0, len(written), size)
        ]
        files, sums = list[StoredFile](), (0, 0)
        for described, part in self._all(read_back, calls):
            files += described
            sums = add_sums(sums, part)
        readable = sum(f.rows for f in files)
        if readable != rows or sums != expected:
            kept = [f.path for f in self.stored_files] + [f.path for f in files]
            raise self._unreadable(
                f"{counted(rows, 'row')} written to feature group {self.folder.name}, {readable:,} can be read back"
                + (" but not as they were" if readable == rows else ""),
                kept,
                "nothing was committed; check the storage, then ingest again",
            )
        return sorted(files, key=lambda f: f.path)

    def _live_digest(self, last: Commit | None, found: Changes) -> str:
        before = last.live_sums if last else (0, 0)
        return digest_of(subtract_sums(add_sums(before, found.live_added), found.live_removed))

    def _all(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], what: str = "", rows: Sequence[int] = ()
    ) -> list[Any]:
        """Results of all calls, in order; reports progress if the calls are worth it."""
        results: dict[int, Any] = {}
        done = 0
        for index, result in self._run(function, calls):
            results[index] = result
            if what:
                done += rows[index]
                self.log.info(f"{done:,} of {sum(rows):,} {what}")
        return [results[n] for n in range(len(calls))]

    def _unreadable(self, what: str, readable: list[str], remedy: str) -> StepError:
        """The error for rows that cannot be read, with the records of the dataset that are in no readable file."""
        stored = [_record_ids(storage.join(self.folder.data_uri, path)) for path in readable]
        found = pl.concat(stored).unique() if stored else None
        lost: set[str] = set()
        for uri in dict.fromkeys(uri for s in self.inputs for uri in s.uris):
            ids = _record_ids(uri).unique()
            lost.update((ids.join(found, on="record_id", how="anti") if found is not None else ids)["record_id"])
        shown = sorted(lost)[:SHOWN]
        named = f"; {counted(len(lost), 'record')} of the dataset cannot be read: {', '.join(shown)}" if lost else ""
        more = " and others" if len(lost) > len(shown) else ""
        details: dict[str, Any] = {"rows_in": self.rows_in, "records_missing": len(lost), "missing_record_ids": shown}
        return StepError(f"{what}{named}{more}. Remedy: {remedy}", details=details)

    def _contradiction(self, found: Changes) -> StepError:
        places = [(int(n), int(row)) for c in found.conflicts for n, row in zip(c.source, c.row, strict=True)][:SHOWN]
        ids = [read_source(self.sources[n], ["record_id"], self.table)["record_id"][row] for n, row in places]
        return StepError(
            f"the dataset has different rows for the same record and event time, so that none of them is the latest: "
            f"record ids {', '.join(sorted(set(ids)))}{' and maybe others' if len(places) == SHOWN else ''}. "
            "Remedy: remove all but one, or give the table an event time column that tells them apart",
            details={"record_ids": sorted(set(ids))},
        )


def _record_ids(uri: str) -> pl.DataFrame:
    with storage.open_input(uri) as file:
        return pl.read_parquet(file, columns=["record_id"])


def run_here(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Run the calls one after the other in this process."""
    for index, call in enumerate(calls):
        yield index, function(*call)
