"""Ingestion of a dataset into a feature group: compare, write, read back, commit.

The pieces run wherever the caller has them run; this module divides the work and commits once, last. What fails or is
killed before has changed nothing for readers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl

from step_scripts.feature_store.commits import STORED_COUNTS, Changes, GroupState, is_ingested
from step_scripts.feature_store.comparison import (
    SHOWN,
    WriteItem,
    compare_partition,
    divided,
    hash_source,
    partition_count,
    write_files,
)
from step_scripts.feature_store.events import (
    Source,
    WriteTarget,
    file_types,
    read_back,
    read_source,
    validate_schema_change,
)
from step_scripts.feature_store.group import Group
from step_scripts.feature_store.iceberg_table import retry_on_commit_conflict
from step_scripts.feature_store.online_store import ParallelRun, bring_online
from step_scripts.parameters import IngestFeaturesParams
from step_scripts.runner import storage
from step_scripts.runner.contract import FileInfo, StepContext, StepError, StepOutcome
from step_scripts.runner.wording import counted
from step_scripts.table.hashes import add_sums

_PIECE_ROWS = (1 << 17, 1 << 20)  # fewest and most rows of a piece: a worker holds one piece, about 0.4 kB a row
_FILES_READ_AT_ONCE = 64


@dataclass(frozen=True)
class Ingestion:
    """Ingest the input `rows` of a step (columns record_id, event_time and those of the table) into a group.

    The group may not be there yet. If the step's target is a mirror, the group's live records become those of the
    dataset: others are deleted. If it has an online store, the latest event of every record that changes goes there
    before the commit. `run` runs the pieces, `workers` at the same time.
    """

    group: Group
    context: StepContext
    params: IngestFeaturesParams
    run: ParallelRun
    workers: int = 1

    def ingest(self) -> StepOutcome:
        """A dataset that is known already makes no commit, one that is not makes one even if it changes nothing.

        Where writers cannot keep each other out, one that was overtaken compares again with what the other has stored.
        The output `features` are the group's files and the digest of its live records.

        Raises `StepError`, having changed nothing, if the schema does not fit the group's, rows contradict each other,
        files of the group are missing, a row cannot be read back, or others hold the lock for too long.
        """
        log = self.context.log
        with contextlib.ExitStack() as stack:
            with self.context.phase("wait for the lock"):
                stack.enter_context(self.group.lock(create=True))
            self.group.info()  # raises for another format, whose files would be taken for orphans
            if deleted := self.group.delete_orphan_files():
                log.info(f"deleted what an earlier, unfinished ingestion has left: {counted(deleted, 'file')}")
            outcome = retry_on_commit_conflict(partial(self._attempt, deleted), log.info)
        storage.delete_folder(self._scratch_uri)
        return outcome

    @property
    def _scratch_uri(self) -> str:
        return storage.join(self.context.attempt_uri, "scratch")  # goes with the attempt if the step fails

    def _attempt(self, deleted: int) -> StepOutcome:
        """Ingest into the group as it is now. Raises `CommitTaken` if another writer commits first.

        `deleted`: how many orphan files were removed before.
        """
        group, table, target, dataset = self.group, self.params.table, self.params.target, self.context.inputs["rows"]
        files = [f for f in dataset.files if f.path.endswith(".parquet")]
        inputs = self._pieces(dataset.uri, files)
        rows = sum(source.rows for source in inputs)
        if not rows:
            raise StepError(f"the dataset {dataset.uri} has no rows, so there is nothing to ingest")
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
        if not has_new_columns and is_ingested(state.commits, dataset.digest, mirror=target.mirror):
            self.context.log.info(f"feature group {group.name} holds this dataset already")
            return self._outcome(state, Changes(unchanged=rows), rows, rows, None, deleted)
        with group.attempt(state, table) as attempt:
            with self.context.phase("compare"):
                found, items = self._compare(inputs, state, attempt.target)
            with self.context.phase("write"):
                calls = [(item, attempt.target) for item in items]
                written = self._all(write_files, calls, "rows written", [item.rows for item in items])
            paths = sorted(path for part in written for path in part)
            count = sum(item.rows for item in items)
            with self.context.phase("read back"):
                self._read_back(attempt.target, paths, found, count, state)
            self.context.confirm()
            if target.online is not None:
                before = f"its latest commit is still {len(state.commits)}" if state.commits else "it has no commit"
                with self.context.phase("write online"):
                    bring_online(self.run, items, table, target.online, found.latest, self.context, before)
            with self.context.phase("commit"):
                mirrors = target.mirror or not state.files
                commit = state.after(found, attempt.target, dataset_digest=dataset.digest, mirrors=mirrors)
                group.append(attempt, commit, paths)
        readable = count - found.deleted + found.unchanged
        return self._outcome(group.state(commit.number), found, rows, readable, paths, deleted)

    def _outcome(
        self, state: GroupState, found: Changes, rows: int, readable: int, paths: list[str] | None, deleted: int
    ) -> StepOutcome:
        """What has been `found` to change, and was stored in the files at `paths` (None: no commit), as plain data."""
        commit, log = state.commits[-1], self.context.log
        counts = {name: getattr(found, name) for name in STORED_COUNTS}
        log.info(
            f"feature group {state.name}: {counted(rows, 'row')} in, {readable:,} readable; "
            + ", ".join(f"{count:,} {name}" for name, count in counts.items())
            + f"; commit {commit.number}, {counted(commit.live_rows, 'live record')}"
        )
        if found.outdated:
            log.warning(f"rows older than what the feature group holds of their records: {found.outdated:,}")
        metrics: dict[str, float] = {"rows_in": rows, "rows_readable": readable, **counts}
        if self.params.target.online is not None:
            metrics["written_online"] = found.latest
        return StepOutcome(
            outputs={"features": state.artifact()},
            metrics=metrics,
            details={
                "group": state.name,
                "commit": commit.number,
                "snapshot_id": str(commit.snapshot_id),
                "committed": paths is not None,
                "already_ingested": paths is None,
                "deduplicate": commit.deduplicate,
                "outdated_rows": found.outdated,
                "day_partitions_written": len({path.partition("/")[0] for path in paths or ()}),
                "live_rows": commit.live_rows,
                "files": len(state.files),
                "orphan_files_deleted": deleted,
                "timings": {name: round(seconds, 3) for name, seconds in self.context.seconds.items()},
            },
        )

    def _compare(self, inputs: list[Source], state: GroupState, target: WriteTarget) -> tuple[Changes, list[WriteItem]]:
        """What the dataset changes, and what is to be written."""
        # The files of another attempt are divided otherwise.
        scratch, mirror = storage.join(self._scratch_uri, target.token), self.params.target.mirror
        rows_in, stored_rows = sum(source.rows for source in inputs), sum(file.rows or 0 for file in state.files)
        # A small dataset is compared with the events of its own records only.
        known_only = not mirror and rows_in * 4 < stored_rows
        partitions = partition_count(rows_in + (rows_in if known_only else stored_rows))
        calls = [(source, target.table, partitions, scratch, False) for source in inputs]
        times = self._all(hash_source, calls, "rows read", [source.rows for source in inputs])
        stored = self._pieces(state.data_uri, state.files, len(inputs), file_types(target.schema))
        calls = [(source, target.table, partitions, scratch, known_only) for source in stored]
        self._all(hash_source, calls, "stored rows compared", [source.rows for source in stored])
        sources, mirror_time = [*inputs, *stored], max(times) if mirror else None
        compared = self._all(compare_partition, [(n, len(sources), scratch, mirror_time) for n in range(partitions)])
        found = sum((changes for changes, _ in compared), Changes())
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
        incoming = pl.concat(_record_ids(uri) for uri in self.context.inputs["rows"].file_uris(".parquet"))
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
        ids = {read_source(sources[n], ["record_id"], self.params.table)["record_id"][row] for n, row in places}
        return StepError(
            f"the dataset has different rows for the same record and event time, so that none of them is the latest: "
            f"record ids {', '.join(sorted(ids))}{' and maybe others' if len(places) == SHOWN else ''}. "
            "Remedy: remove all but one, or give the table an event time column that tells them apart",
            details={"record_ids": sorted(ids)},
        )

    def _pieces(
        self, folder: str, files: Sequence[FileInfo], first_index: int = 0, stored: Mapping[str, Any] | None = None
    ) -> list[Source]:
        """Consecutive files below `folder` as sources of no more rows than a piece has, or of one file."""
        most, held = self._piece_rows(sum(file.rows or 0 for file in files)), 0
        groups: list[list[FileInfo]] = []
        for file in files:
            rows = file.rows or 0
            if not groups or held + rows > most:
                groups.append([])
                held = 0
            groups[-1].append(file)
            held += rows
        return [
            Source(index, tuple(storage.join(folder, f.path) for f in group), sum(f.rows or 0 for f in group), stored)
            for index, group in enumerate(groups, first_index)
        ]

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
                self.context.log.info(f"{sum(rows[n] for n in results):,} of {sum(rows):,} {what}")
        return [results[n] for n in range(len(calls))]


def _record_ids(uri: str) -> pl.DataFrame:
    with storage.open_input(uri) as file:
        return pl.read_parquet(file, columns=["record_id"])
