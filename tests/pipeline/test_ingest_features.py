"""Step `ingest_features` as it runs: real Ray actors, real files, real deaths of processes."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import psutil
import pytest
import ray
import ray.data

from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.runner.contract import Artifact, StepError, StepRequest, StepResult
from step_scripts.runner.execution import run_step
from step_scripts.runner.ray_data import configure, each_call
from step_scripts.runner.ray_session import RaySession
from tests.fatal_calls import always_fatal, once_fatal
from tests.feature_rows import (
    NOON,
    TABLE,
    Log,
    ingest_rows,
    latest_events,
    record_id,
    records,
    row,
    rows_frame,
    run_here,
    scan,
    write_frame,
    write_rows,
)
from tests.other_engines import latest_by_duckdb


def ingest(
    session: RaySession, folder: Path, dataset: Artifact, *, log: Log | None = None, num_actors: int | None = None,
    group: str = "sales", **target: Any,
) -> StepResult:  # fmt: skip
    request = StepRequest(
        step="ingest_features",
        params={
            "table": TABLE.model_dump(mode="json"),
            "group": group,
            "num_actors": num_actors,
            "target": {"root": str(folder / "store")} | target,
        },
        inputs={"rows": dataset},
        output_root=str(folder / "out"),
        code_version=str(time.time_ns()),  # never answered from a manifest
    )
    return run_step(request, log or Log(), session)


def many_rows(count: int) -> pl.DataFrame:
    """Rows of three days, in no order of their ids."""
    numbers = np.arange(count)
    return pl.select(
        record_id=pl.Series([f"{n:032x}" for n in np.random.default_rng(1).permutation(count)]),
        event_time=pl.lit(NOON, pl.Datetime("us", "UTC")) + pl.duration(days=pl.lit(pl.Series(numbers % 3))),
        PRICE=pl.Series(numbers * 0.5),
        ROOMS=pl.Series(numbers % 7),
        SOLD=pl.Series(numbers % 2 == 0),
    )


def test_rows_in_are_rows_readable(ray_session: RaySession, tmp_path: Path) -> None:
    frame = many_rows(30_000)
    log = Log()
    result = ingest(ray_session, tmp_path, write_frame(tmp_path, frame, parts=4), log=log)
    assert result.metrics == {
        "rows_in": 30_000, "rows_readable": 30_000, "added": 30_000, "unchanged": 0, "superseded": 0, "deleted": 0
    }  # fmt: skip
    details = result.details
    assert (details["commit"], details["deduplicate"], details["group"]) == (1, False, "sales")
    assert (
        details["day_partitions_written"] == len({Path(f.path).parent for f in result.outputs["features"].files}) == 3
    )
    assert {"compare", "write", "read back", "commit"} <= details["timings"].keys()
    assert "30,000 of 30,000 rows written" in log.messages
    assert not list((tmp_path / "out").rglob("scratch"))
    features = result.outputs["features"]
    assert features.rows == 30_000
    for file in features.files:
        content = Path(features.file_uri(file.path)).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    read = pl.read_parquet(features.file_uris(), hive_partitioning=False).select(frame.columns)
    assert read.sort("record_id").equals(frame.sort("record_id"))


def test_a_second_ingestion_stores_only_what_changed(ray_session: RaySession, tmp_path: Path) -> None:
    frame = many_rows(5_000)
    first = ingest(ray_session, tmp_path, write_frame(tmp_path, frame))
    changed = frame.with_columns(PRICE=pl.when(pl.int_range(pl.len()) < 50).then(-1.0).otherwise("PRICE"))
    second = ingest(ray_session, tmp_path, write_frame(tmp_path, changed, parts=3))
    assert (second.metrics["superseded"], second.metrics["unchanged"]) == (50, 4_950)
    assert second.outputs["features"].rows == 5_000
    assert second.outputs["features"].digest != first.outputs["features"].digest
    assert sum(f.rows or 0 for f in second.outputs["features"].files) == 5_050
    assert second.details["deduplicate"]
    back = ingest(ray_session, tmp_path, write_frame(tmp_path, frame))
    assert back.outputs["features"].digest == first.outputs["features"].digest
    again = ingest(ray_session, tmp_path, write_frame(tmp_path, frame))
    assert (again.details["already_ingested"], again.details["commit"]) == (True, 3)
    assert again.outputs == back.outputs


def test_a_mirror_deletes_what_the_dataset_lacks(ray_session: RaySession, tmp_path: Path) -> None:
    frame = many_rows(3_000)
    ingest(ray_session, tmp_path, write_frame(tmp_path, frame), mirror=True)
    fewer = ingest(ray_session, tmp_path, write_frame(tmp_path, frame[:2_900]), mirror=True)
    assert (fewer.metrics["deleted"], fewer.metrics["rows_readable"], fewer.details["live_rows"]) == (100, 2_900, 2_900)
    store = OfflineStore(str(tmp_path / "store"))
    assert set(records(scan(store))) == set(frame[:2_900]["record_id"])
    tombstones = pl.read_parquet(fewer.outputs["features"].file_uris(), hive_partitioning=False).filter("is_deleted")
    assert set(tombstones["event_time"]) == {NOON + timedelta(days=2), NOON + timedelta(days=2, microseconds=1)}
    assert tombstones["PRICE"].null_count() == tombstones.height == 100


def test_actors_store_what_one_process_stores(ray_session: RaySession, tmp_path: Path) -> None:
    frame = many_rows(10_000)
    by_actors = ingest(ray_session, tmp_path, write_frame(tmp_path, frame, parts=5), num_actors=2)
    alone = OfflineStore(str(tmp_path / "alone"))
    ingest_rows(alone, write_frame(tmp_path, frame), run=run_here)
    assert by_actors.outputs["features"].digest == alone.state("sales").artifact().digest


def test_two_ingestions_at_once_both_land(ray_session: RaySession, tmp_path: Path) -> None:
    datasets = [write_rows(tmp_path, [row(100 * k + n) for n in range(100)]) for k in range(2)]
    results: list[StepResult] = []
    threads = [threading.Thread(target=lambda d=d: results.append(ingest(ray_session, tmp_path, d))) for d in datasets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.details["commit"] for r in results) == [1, 2]
    store = OfflineStore(str(tmp_path / "store"))
    assert set(records(scan(store))) == {record_id(n) for n in range(200)}


def test_a_lost_row_fails_the_step_and_commits_nothing(ray_session: RaySession, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, [row(0), row(1, hours=24)])
    ingest(ray_session, tmp_path, dataset)
    store = OfflineStore(str(tmp_path / "store"))
    next(Path(store.folder("sales").data_uri).rglob("event_time_day=2024-05-02/*.parquet")).unlink()
    with pytest.raises(StepError, match=f"1 record of the dataset cannot be read: {record_id(1)}") as caught:
        ingest(ray_session, tmp_path, dataset)
    assert caught.value.details["records_missing"] == 1
    assert len(store.commits("sales")) == 1


def test_ray_data_and_duckdb_read_what_the_splits_hold(ray_session: RaySession, tmp_path: Path) -> None:
    frame = many_rows(3_000)
    ingest(ray_session, tmp_path, write_frame(tmp_path, frame))
    changed = frame[:2_000].with_columns(PRICE=pl.col("PRICE") + 0.25, event_time=NOON + timedelta(days=9))
    features = ingest(ray_session, tmp_path, write_frame(tmp_path, changed), mirror=True).outputs["features"]
    split = run_step(
        StepRequest(
            step="prepare_splits",
            params={"table": TABLE.model_dump(mode="json"), "deduplicate": True},
            inputs={"features": features},
            output_root=str(tmp_path / "out"),
            code_version="1",
        ),
        Log(),
        ray_session,
    )
    columns = ["record_id", *TABLE.column_names]
    parts = [pl.read_parquet(split.outputs[name].file_uris()) for name in ("train", "validation", "test")]
    wanted = pl.concat(parts).select(columns).sort("record_id")
    assert wanted.height == 2_000
    folder = tmp_path / "store" / "sales"
    place = {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}"}
    configure()
    blocks = ray.data.read_iceberg(
        table_identifier="feature_store.sales", catalog_kwargs={"name": "housing", **place}, override_num_blocks=1
    )
    events = pl.concat([cast(pl.DataFrame, pl.from_arrow(ray.get(cast(Any, ref)))) for ref in blocks.to_arrow_refs()])
    assert events.height == sum(f.rows or 0 for f in features.files) == 6_000
    assert latest_events(events.lazy()).select(columns).collect().sort("record_id").equals(wanted)
    assert latest_by_duckdb(events.to_arrow()).select(columns).sort("record_id").equals(wanted)


@pytest.mark.parametrize(
    ("target", "message"),
    [({"kind": "sagemaker"}, "target.kind: Extra inputs"), ({"typo": 1}, "target.typo")],
)
def test_another_target_is_refused(
    ray_session: RaySession, tmp_path: Path, target: dict[str, Any], message: str
) -> None:
    with pytest.raises(StepError, match=message):
        ingest(ray_session, tmp_path, write_rows(tmp_path, [row(0)]), **target)


def test_problems_found_in_an_actor_reach_the_user(ray_session: RaySession, tmp_path: Path) -> None:
    broken = write_frame(tmp_path, rows_frame([row(0)]).drop("ROOMS"))
    with pytest.raises(StepError, match=r"part-00000.parquet lacks the columns \['ROOMS'\]"):
        ingest(ray_session, tmp_path, broken)


# --- actors that die -----------------------------------------------------------------------------------------------


def test_work_of_a_dead_actor_is_done_again_once(ray_session: RaySession, tmp_path: Path) -> None:
    calls = [(str(tmp_path / ("marker" if n == 2 else "none")), n) for n in range(6)]
    (tmp_path / "none").touch()
    results = list(each_call(once_fatal, calls, actors=2))
    assert (tmp_path / "marker").exists()
    assert sorted(results) == [(n, n * n) for n in range(6)]


def test_work_that_kills_every_actor_fails_with_a_remedy(ray_session: RaySession) -> None:
    with pytest.raises(StepError, match=r"ended 4 times in always_fatal.*use fewer actors"):
        list(each_call(always_fatal, [()], actors=1))


def test_a_killed_actor_loses_and_doubles_nothing(ray_session: RaySession, tmp_path: Path) -> None:
    frame = many_rows(200_000)
    dataset = write_frame(tmp_path, frame, parts=4)
    killed: list[int] = []
    finished = threading.Event()

    def kill_one() -> None:
        while not killed and not finished.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    if re.match(r"ray::MapWorker.*\.submit", " ".join(process.cmdline())):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        result = ingest(ray_session, tmp_path, dataset, num_actors=2)
    finally:
        finished.set()
        killer.join()
    assert killed, "no actor was caught at work"
    assert result.metrics["rows_readable"] == 200_000
    read = scan(OfflineStore(str(tmp_path / "store"))).collect()
    assert read.sort("record_id").equals(frame.sort("record_id"))
    counts = Counter(p.name for p in (tmp_path / "store" / "sales" / "data").rglob("*.parquet"))
    assert sorted(counts) == sorted(Path(f.path).name for f in result.outputs["features"].files)
