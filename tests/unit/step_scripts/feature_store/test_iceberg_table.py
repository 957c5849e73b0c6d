"""The offline store as an Iceberg table: other engines, time travel, upkeep, moved roots, the layout of before."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import TruncateTransform
from pyiceberg.types import BooleanType, DoubleType, LongType, NestedField, StringType, TimestamptzType

import housing_assets.definitions  # noqa: F401  # jobs ask the code location what there is
from housing_assets.deployments import load_resources
from housing_assets.maintenance.retention import compact as compaction
from housing_assets.maintenance.retention import prune
from resources.references.io_manager import StoredReference
from step_scripts.feature_store import __main__ as command
from step_scripts.feature_store import iceberg_table, offline_store
from step_scripts.feature_store.commits import is_ingested
from step_scripts.feature_store.group import COMMAND
from step_scripts.feature_store.group_places import LocalGroup
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.runner.contract import StepError
from step_scripts.table.spec import ColumnSpec
from tests.feature_rows import (
    NOON,
    TABLE,
    ingest_rows,
    record_id,
    records,
    row,
    rows_frame,
    scan,
    write_frame,
    write_rows,
)
from tests.other_engines import latest_by_duckdb, opened
from tests.registry_contract import artifact, register


@pytest.fixture
def store(tmp_path: Path) -> OfflineStore:
    return OfflineStore(str(tmp_path / "store"))


@pytest.fixture
def history(store: OfflineStore, tmp_path: Path) -> OfflineStore:
    """Four commits: rows, changed and later ones, a new file with a column more, a deletion."""
    ingest_rows(store, write_rows(tmp_path, [row(n, hours=24 * (n % 2)) for n in range(6)]))
    ingest_rows(store, write_rows(tmp_path, [row(0, 2.0, hours=1), row(1, 2.0, hours=-1), row(6)]))
    store.delete_record("sales", record_id(2), NOON + timedelta(hours=2))
    ingest_rows(store, write_rows(tmp_path, [row(n, 3.0, hours=30) for n in range(3, 5)]))
    return store


def by_duckdb(store: OfflineStore) -> dict[str, tuple[Any, ...]]:
    found = latest_by_duckdb(opened(store.root).scan().to_arrow())
    return records(found.lazy().select("record_id", "event_time", *TABLE.column_names))


def test_other_engines_read_the_same_records(history: OfflineStore) -> None:
    wanted = records(scan(history))
    table = opened(history.root)
    assert by_duckdb(history) == wanted
    order = ["event_time", "api_invocation_time", "write_time"]
    latest = pl.scan_iceberg(table).sort(order).unique("record_id", keep="last").filter(~pl.col("is_deleted"))
    assert records(latest.select("record_id", "event_time", *TABLE.column_names)) == wanted


def test_time_travel_by_snapshot(history: OfflineStore) -> None:
    table = opened(history.root)
    for commit in history.commits("sales"):
        assert commit.snapshot_id is not None
        events = table.scan(snapshot_id=commit.snapshot_id).to_arrow()
        assert events.num_rows == sum(f.rows or 0 for f in history.state("sales", commit.number).files)
        summary = table.snapshot_by_id(commit.snapshot_id)
        assert summary is not None
        assert summary.summary is not None
        facts = summary.summary.additional_properties
        assert (facts["housing.live-rows"], facts["housing.live-digest"]) == (str(commit.live_rows), commit.live_digest)
    assert history.state("sales", commit=2).commits == history.commits("sales")[:2]


def as_sagemaker(catalog: Any, identifier: tuple[str, ...], spec: Any, location: str) -> None:
    """The table that SageMaker makes: its three types, event times as text, partitions by the first ten characters."""
    catalog.create_namespace_if_not_exists(identifier[:-1])
    kinds = {"float64": DoubleType(), "int64": LongType(), "bool": LongType(), "string": StringType()}
    columns = [("record_id", StringType()), ("event_time", StringType())]
    columns += [(column.name, kinds[column.dtype]) for column in spec.columns]
    columns += [("write_time", TimestamptzType()), ("api_invocation_time", TimestamptzType())]
    columns += [("is_deleted", BooleanType())]
    schema = Schema(*(NestedField(n, name, kind, required=False) for n, (name, kind) in enumerate(columns, 1)))
    by_day = PartitionSpec(PartitionField(2, 1000, TruncateTransform(10), "event_time_trunc"))
    catalog.create_table(identifier, schema, location=location, partition_spec=by_day)


def test_a_table_of_sagemakers_types_holds_the_same(
    store: OfflineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iceberg_table, "create", as_sagemaker)
    rows = [row(0, sold=False), row(1, hours=-24 * 366 * 60 + 1e-7, rooms=None), row(2, hours=1 / 3600e6)]
    first = ingest_rows(store, write_rows(tmp_path, rows))
    assert records(scan(store)) == {r[0]: r[1:] for r in rows}
    first_times = [first for first, _ in store.state("sales").event_times]
    assert sorted(first_times) == sorted({r[1] for r in rows} - {rows[2][1]})
    assert all(f.path.startswith("event_time_trunc=") for f in first.stored)
    assert ingest_rows(store, write_rows(tmp_path, rows), mirror=True).stored == ()
    extra = ColumnSpec(name="SEEN", dtype="bool", nullable=True)
    wider = TABLE.model_copy(update={"columns": (*TABLE.columns, extra)})
    frame = rows_frame([(*row(0, 2.0, hours=1), False)], wider)  # pyright: ignore[reportArgumentType]
    ingest_rows(store, write_frame(tmp_path, frame), table=wider)
    assert records(scan(store))[record_id(0)] == (NOON + timedelta(hours=1), 2.0, 3, True, False)
    assert store.delete_record("sales", record_id(2), NOON + timedelta(hours=2))
    assert set(records(scan(store, as_of=NOON + timedelta(minutes=1)))) == {r[0] for r in rows}
    assert set(records(scan(store))) == {record_id(0), record_id(1)}
    found = latest_by_duckdb(opened(store.root).scan().to_arrow())
    assert dict(found.select("record_id", "event_time").iter_rows())[record_id(0)] == "2024-05-01T13:00:00.000000Z"
    assert set(found["record_id"]) == {record_id(0), record_id(1)}


# --- places --------------------------------------------------------------------------------------------------------


def test_roots_with_blanks_umlauts_and_plus_work(tmp_path: Path) -> None:
    store = OfflineStore(str(tmp_path / "Häuser + mehr (1)"))
    ingest_rows(store, write_rows(tmp_path, [row(0)]))
    ingest_rows(store, write_rows(tmp_path, [row(1)]))
    assert set(records(scan(store))) == set(by_duckdb(store)) == {record_id(0), record_id(1)}
    assert sorted(p.name for p in tmp_path.iterdir() if len(p.name) < 30) == ["Häuser + mehr (1)"]


@pytest.mark.parametrize("character", "#?%")
def test_roots_that_pyiceberg_takes_for_urls_are_refused(tmp_path: Path, character: str) -> None:
    with pytest.raises(StepError, match=rf"must not contain \{character}\. Use a folder or prefix without"):
        ingest_rows(OfflineStore(str(tmp_path / f"a{character}b")), write_rows(tmp_path / "rows", [row(0)]))
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_a_moved_root_is_refused_until_its_snapshots_are_replayed(history: OfflineStore, tmp_path: Path) -> None:
    wider = TABLE.model_copy(update={"columns": (*TABLE.columns, ColumnSpec(name="X", dtype="float64", nullable=True))})
    frame = rows_frame([(*row(8), 0.5)], wider)  # pyright: ignore[reportArgumentType]
    ingest_rows(history, write_frame(tmp_path, frame), table=wider)
    history.compact("sales")
    ingest_rows(history, write_frame(tmp_path, frame.with_columns(X=1.5, PRICE=9.0)), table=wider)
    history.tidy("sales", {2}, datetime(2000, 1, 1, tzinfo=UTC))
    before, commits = records(scan(history)), history.commits("sales")
    early = records(scan(history, commit=2))
    old = Path(history.root)
    new = old.rename(tmp_path / "moved hither")
    moved = OfflineStore(str(new))
    for use in (
        lambda: moved.state("sales"),
        lambda: moved.get_record("sales", record_id(0)),
        lambda: ingest_rows(moved, write_rows(tmp_path, [row(9)])),
    ):
        with pytest.raises(StepError, match="has been moved or copied") as refused:
            use()
    assert not old.exists()
    assert f"{COMMAND} replay '{new}' sales" in str(refused.value)
    assert command.main(["replay", str(new), "sales"]) == 0
    assert (records(scan(moved)), records(scan(moved, commit=2))) == (before, early)
    alike = [c.model_dump(exclude={"snapshot_id"}) for c in commits]
    assert [c.model_dump(exclude={"snapshot_id"}) for c in moved.commits("sales")] == alike
    table = opened(new)
    replayed = {s.summary.additional_properties["housing.replayed-from"] for s in table.snapshots() if s.summary}
    assert {str(c.snapshot_id) for c in commits} <= replayed
    assert table.refs()["kept-2"].snapshot_id == moved.commits("sales")[1].snapshot_id
    assert {f.name: f.field_id for f in table.schema().fields}["X"] == 9
    later = ingest_rows(moved, write_frame(tmp_path, frame.with_columns(record_id=pl.lit("z"))), table=wider)
    assert later.commit.number == len(commits) + 1


def test_a_lost_catalog_is_made_again_from_the_metadata(history: OfflineStore, tmp_path: Path) -> None:
    before = records(scan(history))
    (Path(history.root) / "sales" / "catalog.db").unlink()
    with pytest.raises(StepError, match=r"the catalog .* of feature group sales is missing"):
        ingest_rows(history, write_rows(tmp_path, [row(9)]))
    assert command.main(["replay", history.root, "sales"]) == 0
    assert records(scan(history)) == before


# --- upkeep --------------------------------------------------------------------------------------------------------


def test_compaction_changes_no_record(history: OfflineStore, tmp_path: Path) -> None:
    before, commits = records(scan(history)), history.commits("sales")
    early = records(scan(history, as_of=NOON))
    assert history.compact("sales") == {"files_before": 5, "files_after": 2}
    assert len(history.state("sales").files) == 2
    assert records(scan(history)) == before == by_duckdb(history)
    assert records(scan(history, as_of=NOON)) == early
    assert [c.model_dump(exclude={"snapshot_id"}) for c in history.commits("sales")] == [
        c.model_dump(exclude={"snapshot_id"}) for c in commits
    ]
    assert history.compact("sales") == {"files_before": 2, "files_after": 2}
    # Later comparisons order events of one time by when they were stored, not by file.
    again = ingest_rows(history, write_rows(tmp_path, [row(n, 3.0, hours=30) for n in range(3, 5)]))
    assert (again.unchanged, again.stored) == (2, ())


def test_expiry_leaves_what_is_kept(history: OfflineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = history.folder("sales")
    before, second = records(scan(history)), records(scan(history, commit=2))
    history.compact("sales")
    stray = Path(group.data_uri) / "event_time_day=2024-05-01" / "STRAY0.parquet"
    stray.write_bytes(b"killed")
    listed = history.tidy("sales", {2}, datetime.now(UTC), dry_run=True)
    assert (listed.expired, listed.orphans) == ((1, 3), ())
    assert len(opened(history.root).snapshots()) == 5
    done = history.tidy("sales", {2}, datetime.now(UTC))
    assert (done.expired, done.orphans) == ((1, 3), ())
    table = opened(history.root)
    assert len(table.snapshots()) == 2
    assert set(table.refs()) == {"main", "kept-2"}
    assert stray.exists()
    assert (records(scan(history)), records(scan(history, commit=2))) == (before, second)
    assert [c.number for c in history.commits("sales")] == [1, 2, 3, 4]
    with pytest.raises(StepError, match="commit 3 has been expired"):
        scan(history, commit=3)
    monkeypatch.setattr(offline_store, "ORPHAN_AGE", timedelta(seconds=-60))
    swept = history.tidy("sales", {2}, datetime.now(UTC))
    assert str(stray) in swept.orphans
    # What the kept snapshot has stays; the files of later commits were replaced by compaction.
    assert (records(scan(history)), records(scan(history, commit=2))) == (before, second)
    assert not stray.exists()
    assert ingest_rows(history, write_rows(tmp_path, [row(9)])).commit.number == 5
    history.tidy("sales", set(), datetime.now(UTC))
    assert len(opened(history.root).snapshots()) == 1
    assert records(scan(history)) == before | {record_id(9): (NOON, 1.0, 3, True)}


# --- formats -------------------------------------------------------------------------------------------------------


def test_a_later_format_is_refused(history: OfflineStore) -> None:
    path = Path(history.root) / "sales" / "group.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(StepError, match="written by a later version of this project"):
        history.state("sales")


def earlier_layout(folder: Path) -> list[dict[str, Any]]:
    """A group as earlier versions wrote it: two commits, the second with a changed row, a deletion, no other file."""
    group = folder / "sales"
    (group / "_commits").mkdir(parents=True)
    table = TABLE.model_dump(mode="json")
    (group / "group.json").write_text(
        json.dumps({"name": "sales", "table": table, "created_at": NOON.isoformat(), "data_uri": None})
    )
    commits: list[dict[str, Any]] = []
    batches = [
        [(row(0), False), (row(1, hours=1), False), (row(2, hours=1), False)],
        [(row(0, 2.0, hours=2), False), (row(1, hours=2), True)],
    ]
    for number, batch in enumerate(batches, 1):
        written = NOON + timedelta(days=number)
        frame = rows_frame([r for r, _ in batch]).with_columns(
            write_time=pl.lit(written, pl.Datetime("us", "UTC")),
            api_invocation_time=pl.lit(written, pl.Datetime("us", "UTC")),
            is_deleted=pl.Series([deleted for _, deleted in batch]),
        )
        files = []
        for (hour,), part in frame.group_by(pl.col("event_time").dt.hour()):
            name = f"year=2024/month=05/day=01/hour={hour}/20240501T{hour}0000Z_{number:016}.parquet"
            path = group / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part.sort("record_id").write_parquet(path)
            time = part["event_time"][0].isoformat()
            facts = {"rows": part.height, "bytes": path.stat().st_size, "sha256": "0" * 64}
            files.append({"path": name, "first_event_time": time, "last_event_time": time, **facts})
        commits.append(
            {
                "number": number, "created_at": written.isoformat(), "write_time": written.isoformat(),
                "dataset_digest": f"dataset-{number}", "table": table, "files": files,
                "added": 3 if number == 1 else 0, "unchanged": 0, "superseded": number - 1, "deleted": number - 1,
                "live_rows": 4 - number - (number == 1), "live_digest": f"{number:032x}", "mirrors": number == 1,
                "deduplicate": number == 2,
            }
        )  # fmt: skip
        (group / "_commits" / f"{number:08d}.json").write_text(json.dumps(commits[-1]))
    return commits


def test_the_layout_of_before_is_refused_until_it_is_imported(tmp_path: Path) -> None:
    root = tmp_path / "store"
    commits = earlier_layout(root)
    store = OfflineStore(str(root))
    assert store.groups() == ["sales"]
    for use in (lambda: store.state("sales"), lambda: ingest_rows(store, write_rows(tmp_path, [row(5)]))):
        with pytest.raises(StepError, match=f"layout of an earlier version.*\n    {COMMAND} import {root} sales"):
            use()
    copy = shutil.copytree(root, tmp_path / "to delete")
    OfflineStore(str(copy)).delete_group("sales")
    assert command.main(["import", str(root), "sales"]) == 0
    assert command.main(["import", str(root), "sales"]) == 1
    at = NOON + timedelta(hours=1)
    assert records(scan(store)) == {
        record_id(0): (NOON + timedelta(hours=2), 2.0, 3, True), record_id(2): (at, 1.0, 3, True),
    }  # fmt: skip
    assert set(records(scan(store, commit=1))) == {record_id(n) for n in range(3)}
    assert set(records(scan(store, as_of=at))) == {record_id(n) for n in range(3)}
    found = [c.model_dump(mode="json", exclude={"snapshot_id"}) for c in store.commits("sales")]
    for new, old in zip(found, commits, strict=True):
        old.pop("files")
        assert {k: v for k, v in new.items() if "time" not in k and "_at" not in k and k != "table"} == {
            k: v for k, v in old.items() if "time" not in k and "_at" not in k and k != "table"
        }
    assert [c.write_time for c in store.commits("sales")] == [NOON + timedelta(days=n) for n in (1, 2)]
    assert is_ingested(store.commits("sales"), "dataset-2", mirror=False)
    assert sorted(p.name for p in (root / "sales").iterdir()) == ["catalog.db", "data", "group.json", "metadata"]
    assert isinstance(store.folder("sales"), LocalGroup)
    assert by_duckdb(store) == records(scan(store))


# --- jobs ----------------------------------------------------------------------------------------------------------


def test_the_jobs_keep_what_splits_and_versions_name(tmp_path: Path) -> None:
    resources = load_resources({"HOUSING_ROOT": str(tmp_path)})
    store = OfflineStore(resources["feature_store"].root)
    for number in range(5):
        ingest_rows(store, write_rows(tmp_path / "rows", [row(number)]))
    read: Any = {"snapshot": {"group": "sales", "commit": 2}}
    StoredReference(asset="train_split", run_id="run-1", value=read).write(str(tmp_path / "references"))
    lineage = {"train_split": {"group": "sales", "commit": 3}}
    register(resources["model_registry"], artifact(tmp_path / "model"), lineage=lineage)
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        done = compaction.execute_in_process(resources=resources, instance=instance)
        assert done.success
        assert len(store.state("sales").files) == 1
        config = {"ops": {"prune_old": {"config": {"dry_run": False, "results_days": 0.0}}}}
        done = prune.execute_in_process(run_config=config, resources=resources, instance=instance)
        assert done.success
    assert set(opened(store.root).refs()) == {"main", "kept-2", "kept-3"}
    assert [set(records(scan(store, commit=n))) for n in (2, 3)] == [{record_id(k) for k in range(n)} for n in (2, 3)]
    with pytest.raises(StepError, match="commit 4 has been expired"):
        scan(store, commit=4)
