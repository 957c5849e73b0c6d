"""The offline store on S3: what the local one must do, and writers without a lock."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pyiceberg.exceptions import TableAlreadyExistsError

from step_scripts.feature_store import comparison, group_places, iceberg_table, ingestion
from step_scripts.feature_store.group import Group, GroupInfo
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.feature_store.online_client import feature_types
from step_scripts.runner.contract import StepError
from step_scripts.table.spec import TableSpec
from tests.feature_rows import TABLE, ingest_rows, record_id, records, row, run_here, scan, write_rows
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.iceberg_tables import create_table
from tests.sagemaker_emulator.testing import Aws

# The same tests, with this module's `store`.
from tests.unit.step_scripts.feature_store.test_offline_store import (  # noqa: F401
    test_a_changed_row_supersedes_and_an_older_one_is_history,
    test_a_dataset_of_another_form_is_refused,
    test_a_dataset_that_was_superseded_is_not_taken_for_known,
    test_a_file_saved_again_stores_nothing_and_is_known_from_then_on,
    test_a_new_column_that_may_be_empty_is_adopted,
    test_a_stale_writer_cannot_commit,
    test_deleting_a_record,
    test_groups_are_separate_and_can_be_deleted,
    test_ingestions_at_the_same_time_all_land,
    test_mirror_follows_the_dataset_also_back_to_an_older_file,
    test_mirror_takes_an_older_row_for_the_latest,
    test_other_schema_changes_are_refused,
    test_rows_that_contradict_each_other_are_named,
    test_snapshots_differ_by_what_they_hold,
    test_the_same_dataset_adds_nothing_and_makes_no_commit,
)

HOOKED = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from step_scripts.feature_store.offline_store import OfflineStore
from tests.feature_rows import ingest_rows, row, run_here, write_rows

def run(function, calls):
    results = list(run_here(function, calls))
    if function.__name__ == "write_files":
        os.kill(os.getpid(), signal.SIGKILL)
    return results

ingest_rows(OfflineStore(sys.argv[1]), write_rows(Path(sys.argv[2]), [row(1), row(2, hours=24)]), run=run)
"""


class _Group(group_places.GlueGroup):
    """Its table is made, and dropped, as on SageMaker before the offline store has to do with it."""

    def create(self, table: TableSpec, data_uri: str | None = None, glue_table: str | None = None) -> None:
        bucket = self.root.split("/")[2].replace("-", "_")
        super().create(table, data_uri, f"offline_stores.{bucket}_{self.name}")

    def _make_table(self, info: GroupInfo) -> None:
        identifier = self.identifier
        assert identifier is not None
        with contextlib.suppress(TableAlreadyExistsError):
            create_table(
                iceberg_table.glue_catalog(), (identifier[0], identifier[1]), dict(feature_types(info.table)),
                "event_time", f"{self.uri}/table",
            )  # fmt: skip
        super()._make_table(info)

    def remove(self) -> None:
        identifier = self.identifier
        assert identifier is not None
        iceberg_table.glue_catalog().drop_table(identifier)
        super().remove()


class _Store(OfflineStore):
    def folder(self, group: str) -> Group:
        return _Group(self.root, group)


@pytest.fixture
def store(aws: Aws, aws_environment: SageMakerEmulator) -> OfflineStore:
    return _Store(aws.uri("store"))


def data_files(aws: Aws) -> set[str]:
    return {key.rpartition("/")[2] for key in aws.keys("store/") if key.endswith(".parquet")}


def committed_files(store: OfflineStore) -> set[str]:
    return {file.path.rpartition("/")[2] for file in store.state("sales").files}


def interrupting(phase: str, interruption: Callable[[], Any]) -> Callable[..., Any]:
    """Runs calls here, and `interruption` before those of the phase's function; once."""
    left = [interruption]

    def run(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Any:
        if function.__name__ == phase and left:
            left.pop()()
        return run_here(function, calls)

    return run


def test_who_was_overtaken_compares_again(store: OfflineStore, aws: Aws, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0), row(1)]))
    other = write_rows(tmp_path, [row(1, 2.0, hours=1), row(2)])
    mine = write_rows(tmp_path, [row(1, 2.0, hours=1), row(3)])
    result = ingest_rows(store, mine, run=interrupting("read_back", lambda: ingest_rows(store, other)))
    # Against the first commit both rows were news; against the second one of them is stored already.
    assert (result.commit.number, result.added, result.unchanged, result.superseded) == (3, 1, 1, 0)
    assert result.rows_readable == 2
    assert set(records(scan(store))) == {record_id(n) for n in range(4)}
    assert result.commit.live_rows == 4
    assert data_files(aws) == committed_files(store)


def test_a_failure_removes_its_own_files_only(store: OfflineStore, aws: Aws, tmp_path: Path) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))

    def fail() -> None:
        def interrupt() -> None:
            assert len(data_files(aws)) == 3
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ingest_rows(store, write_rows(tmp_path, [row(1)]), run=interrupting("read_back", interrupt))
        assert len(data_files(aws)) == 2
        assert set(records(scan(store))) == {record_id(0)}

    result = ingest_rows(store, write_rows(tmp_path, [row(2)]), run=interrupting("read_back", fail))
    assert result.commit.number == 2
    assert set(records(scan(store))) == {record_id(0), record_id(2)}
    assert data_files(aws) == committed_files(store)


def test_a_killed_ingestion_is_invisible_and_tidied_up_when_it_is_old(
    store: OfflineStore, aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    killed = subprocess.run(
        [sys.executable, "-c", HOOKED, store.root, str(tmp_path)], cwd=Path(__file__).parents[2], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(data_files(aws)) == 3
    assert set(records(scan(store))) == {record_id(0)}
    assert store.get_record("sales", record_id(1)) is None
    # They could be those of a writer that is at work.
    assert ingest_rows(store, write_rows(tmp_path, [row(1)])).orphan_files_deleted == 0
    assert len(data_files(aws)) == 4
    monkeypatch.setattr(group_places, "ORPHAN_AGE", timedelta(seconds=-60))
    assert store.folder("sales").delete_orphan_files() == 2
    assert data_files(aws) == committed_files(store)
    assert set(records(scan(store))) == {record_id(0), record_id(1)}


def test_a_writer_whose_files_may_be_taken_for_leftovers_gives_up(
    store: OfflineStore, aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_places, "ORPHAN_AGE", timedelta(0))
    with pytest.raises(StepError, match="Nothing was committed; ingest with more actors"):
        ingest_rows(store, write_rows(tmp_path, [row(0)]))
    assert store.commits("sales") == []
    assert not data_files(aws)


def test_lost_files_are_named(store: OfflineStore, aws: Aws, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, [row(0), row(1, hours=24)])
    ingest_rows(store, dataset)
    assert store.find_ingestion("sales", dataset.digest) is not None
    (key,) = [key for key in aws.keys("store/") if "/event_time_trunc=2024-05-02/" in key]
    aws.s3.delete_object(Bucket=aws.bucket, Key=key)
    assert store.find_ingestion("sales", dataset.digest) is None
    with pytest.raises(StepError, match="1 of 2 files"):
        store.get_record("sales", record_id(0))
    with pytest.raises(StepError, match=f"1 record of the dataset cannot be read: {record_id(1)}"):
        ingest_rows(store, dataset)


def test_small_pieces_store_what_one_piece_stores_locally(
    store: OfflineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = OfflineStore(str(tmp_path / "local"))
    batches = [
        [row(n, hours=n % 3) for n in range(12)],
        [row(n, float(n), hours=1 + n % 2) for n in range(4, 10)] + [row(20, hours=2), row(20, 2.0, hours=3)],
    ]
    for rows in batches:
        ingest_rows(local, write_rows(tmp_path, rows), mirror=True)
    monkeypatch.setattr(comparison, "_PARTITION_EVENTS", 4)
    monkeypatch.setattr(ingestion, "_PIECE_ROWS", (2, 4))
    for rows in batches:
        ingest_rows(store, write_rows(tmp_path, rows, parts=3), mirror=True, workers=2)
    assert records(scan(store)) == records(scan(local))
    assert store.state("sales").artifact().digest == local.state("sales").artifact().digest
    one = scan(store).filter(pl.col("PRICE") > 5).select("PRICE").collect()
    assert sorted(one["PRICE"]) == [6.0, 7.0, 8.0, 9.0]


def test_throttling_is_survived(store: OfflineStore, aws: Aws, tmp_path: Path) -> None:
    store.ensure_group("sales", TABLE)
    aws.faults.throttle("s3:*", count=3)
    assert ingest_rows(store, write_rows(tmp_path, [row(0)])).rows_readable == 1
    aws.faults.throttle("s3:*", count=3)
    assert store.get_record("sales", record_id(0)) is not None
    assert not aws.faults.active()
