"""Step `prepare_splits` on hand-made feature store files."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from step_scripts.parameters import PrepareSplitsParams
from step_scripts.runner import ray_data, storage
from step_scripts.runner.contract import Artifact, StepError, StepRequest, StepResult, file_info
from step_scripts.runner.execution import run_step
from step_scripts.runner.ray_session import RaySession
from step_scripts.table.hashes import hashes_of_ids, split_fraction
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests.feature_rows import Log

START = datetime(2024, 1, 1, tzinfo=UTC)
TABLE = TableSpec(
    name="plots",
    columns=(
        ColumnSpec(name="VALUE", dtype="float64"),
        ColumnSpec(name="AREA", dtype="float64", nullable=True),
        ColumnSpec(name="ROOMS", dtype="int64"),
        ColumnSpec(name="PARCEL", dtype="string"),
    ),
    target="VALUE",
    key_columns=("PARCEL",),
)
SPLITS = ("train", "validation", "test")
COLUMNS = ["record_id", *TABLE.column_names]


def record_id(number: int) -> str:
    return f"{(number * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 1) % 2**128:032x}"


def events(count: int, *, seed: int = 0) -> pl.DataFrame:
    """One event for each of `count` records, a minute apart."""
    random = np.random.default_rng(seed)
    times = [START + timedelta(minutes=i) for i in range(count)]
    frame = pl.DataFrame(
        {
            "record_id": [record_id(i) for i in range(count)],
            "event_time": times,
            "VALUE": random.normal(4e5, 1e5, count),
            "AREA": random.normal(2000, 500, count),
            "ROOMS": random.integers(1, 7, count),
            "PARCEL": [f"parcel {i}" for i in range(count)],
            "write_time": times,
            "api_invocation_time": times,
            "is_deleted": [False] * count,
        },
        schema_overrides=dict.fromkeys(("event_time", "write_time", "api_invocation_time"), pl.Datetime("us", "UTC")),
    )
    return frame.with_columns(pl.when(pl.col("ROOMS") > 1).then("AREA").alias("AREA"))


def feature_files(folder: Path, frames: list[pl.DataFrame], **options: Any) -> Artifact:
    folder.mkdir(parents=True)
    infos = []
    for index, frame in enumerate(frames):
        path = folder / f"{index:03}.parquet"
        frame.write_parquet(path, **options)
        infos.append(file_info(str(path), str(folder), frame.height))
    return Artifact.of(str(folder), infos)


def split(session: RaySession, features: Artifact, root: Path, log: Log | None = None, **params: Any) -> StepResult:
    chosen = PrepareSplitsParams(table=TABLE, **{"deduplicate": False, **params})
    request = StepRequest(
        step="prepare_splits",
        params=chosen.model_dump(mode="json"),
        inputs={"features": features},
        output_root=str(root),
        code_version="test",
    )
    return run_step(request, log or Log(), session)


def rows_of(result: StepResult, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(uri) for uri in result.outputs[name].file_uris(".parquet")])


def all_rows(result: StepResult) -> pl.DataFrame:
    return pl.concat([rows_of(result, name) for name in SPLITS])


def read_json(result: StepResult, name: str) -> Any:
    return json.loads(storage.read_bytes(result.outputs["statistics"].file_uri(name)))


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(COLUMNS).sort(COLUMNS)


def test_every_record_is_in_exactly_one_split_unchanged(ray_session: RaySession, tmp_path: Path) -> None:
    frame, log = events(4000), Log()
    result = split(ray_session, feature_files(tmp_path / "in", [frame[:1500], frame[1500:]]), tmp_path, log)
    written = all_rows(result)
    assert written.columns == COLUMNS
    assert in_order(written).equals(in_order(frame))
    for name, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        assert result.metrics[f"{name}_fraction"] == pytest.approx(share, abs=0.03)
        assert result.metrics[f"{name}_rows"] == result.outputs[name].rows == rows_of(result, name).height
        assert len(result.outputs[name].files) == 2  # so that two workers can share
    assert log.messages[-1].startswith("prepare_splits: 4,000 of 4,000 rows")


def test_statistics_are_those_of_the_training_split_alone(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(4000).with_columns(pl.lit(7).alias("ROOMS"))
    result = split(ray_session, feature_files(tmp_path / "in", [frame[:700], frame[700:]]), tmp_path)
    train = rows_of(result, "train")
    scaler, statistics = read_json(result, "scaler.json"), read_json(result, "statistics.json")
    area = train["AREA"].drop_nulls().to_numpy()
    assert scaler["mean"]["AREA"] == pytest.approx(area.mean(), rel=1e-12)
    assert scaler["scale"]["AREA"] == pytest.approx(area.std(), rel=1e-12)
    assert (scaler["mean"]["ROOMS"], scaler["scale"]["ROOMS"]) == (7.0, 1.0)  # constant
    assert list(scaler["mean"]) == ["AREA", "ROOMS"]
    assert scaler["rows"] == statistics["rows"] == train.height
    distributions = statistics["distributions"]
    assert set(distributions) == {"AREA", "ROOMS", "VALUE"}
    assert distributions["ROOMS"] == {
        "kind": "counts",
        "rows": train.height,
        "missing": 0,
        "values": [7.0],
        "counts": [train.height],
    }
    value = distributions["VALUE"]
    assert np.allclose(value["points"], np.quantile(train["VALUE"].to_numpy(), np.linspace(0, 1, 257)))
    summary = {row["column"]: row for row in result.details["columns"]}
    assert summary["VALUE"]["role"] == "target"
    assert summary["AREA"]["median"] == pytest.approx(np.median(area), rel=1e-5)


def test_division_into_files_changes_nothing_but_the_files(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(120_000)
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=3)
    one = split(ray_session, feature_files(tmp_path / "a", [frame], row_group_size=30_000), tmp_path)
    many = split(
        ray_session, feature_files(tmp_path / "b", [shuffled[i::7] for i in range(7)]), tmp_path, deduplicate=True
    )
    for name in SPLITS:
        assert one.outputs[name].digest == many.outputs[name].digest
        assert in_order(rows_of(one, name)).equals(in_order(rows_of(many, name)))
    assert len(one.outputs["train"].files) == 2  # a block's rows are divided in two, for two workers of a fit
    assert one.outputs["statistics"].digest == many.outputs["statistics"].digest
    for column, mean in read_json(one, "scaler.json")["mean"].items():
        assert read_json(many, "scaler.json")["mean"][column] == pytest.approx(mean, rel=1e-12)
    assert read_json(one, "statistics.json") == read_json(many, "statistics.json")


def test_a_repeated_run_writes_the_same_bytes(ray_session: RaySession, tmp_path: Path) -> None:
    features = feature_files(tmp_path / "in", [events(60_000)], row_group_size=9_000)
    first, second = (split(ray_session, features, tmp_path / name, deduplicate=True) for name in "ab")
    for name in (*SPLITS, "statistics"):
        assert first.outputs[name].files == second.outputs[name].files


def test_digest_sees_a_changed_value(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(1000)
    changed = frame.with_columns(
        pl.when(pl.col("record_id") == record_id(7)).then(pl.col("VALUE") + 1e-9).otherwise("VALUE").alias("VALUE")
    )
    before, after = (
        split(ray_session, feature_files(tmp_path / name, [f]), tmp_path) for name, f in (("a", frame), ("b", changed))
    )
    differing = [name for name in SPLITS if before.outputs[name].digest != after.outputs[name].digest]
    assert len(differing) == 1
    assert record_id(7) in rows_of(after, differing[0])["record_id"]


@settings(max_examples=15, deadline=None)
@given(start=st.integers(50, 200), more=st.integers(1, 300), salt=st.text(max_size=8))
def test_a_record_never_changes_sides_when_data_grows(
    ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory, start: int, more: int, salt: str
) -> None:
    frame, folder = events(start + more), tmp_path_factory.mktemp("growing")
    small, large = (
        split(ray_session, feature_files(folder / name, [f]), folder, split_salt=salt)
        for name, f in (("small", frame[:start]), ("large", frame))
    )
    for name in SPLITS:
        assert set(rows_of(small, name)["record_id"]) <= set(rows_of(large, name)["record_id"])


HISTORIES = st.lists(
    st.tuples(
        st.integers(0, 11),  # record
        st.integers(0, 6),  # event time, hours
        st.integers(0, 3),  # write time, hours after
        st.booleans(),  # deleted
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=25, deadline=None)
@given(history=HISTORIES, files=st.integers(1, 4), as_of=st.one_of(st.none(), st.integers(0, 7)))
def test_the_latest_event_of_each_record_counts(
    ray_session: RaySession,
    tmp_path_factory: pytest.TempPathFactory,
    history: list[tuple[int, int, int, bool]],
    files: int,
    as_of: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("history")
    # Records whose history is not at stake, so that no split is empty.
    others = events(400)[100:]
    rows = (
        others.head(len(history))
        .with_columns(
            pl.Series("record_id", [record_id(record) for record, *_ in history]),
            pl.Series("event_time", [START + timedelta(hours=hour) for _, hour, *_ in history]),
            pl.Series("write_time", [START + timedelta(hours=hour + later) for _, hour, later, _ in history]),
            pl.lit(START).cast(pl.Datetime("us", "UTC")).alias("api_invocation_time"),
            pl.Series("is_deleted", [deleted for *_, deleted in history]),
            pl.Series("ROOMS", range(len(history))),
        )
        .cast({"event_time": pl.Datetime("us", "UTC"), "write_time": pl.Datetime("us", "UTC")})
    )
    pieces = [rows[i * len(history) // files : (i + 1) * len(history) // files] for i in range(files)]
    others = others.with_columns(pl.lit(START).cast(pl.Datetime("us", "UTC")).alias("event_time"))
    limit = None if as_of is None else START + timedelta(hours=as_of)

    model: dict[str, tuple[tuple[int, int], bool, int]] = {}
    for number, (record, hour, later, deleted) in enumerate(history):
        if as_of is not None and hour > as_of:
            continue
        key, rank = record_id(record), (hour, hour + later)
        if key not in model or rank >= model[key][0]:
            model[key] = (rank, deleted, number)
    expected = {(key, number) for key, (_, deleted, number) in model.items() if not deleted}

    features = feature_files(folder / "in", [*pieces, others])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_data, "_SMALLEST_BLOCK_ROWS", 50)  # several pieces, so that rows are exchanged
        result = split(ray_session, features, folder, deduplicate=True, as_of=limit.isoformat() if limit else None)
    assert max(file.path for name in SPLITS for file in result.outputs[name].files) > "part-00000.parquet"
    written = all_rows(result)
    assert written["record_id"].is_unique().all()
    mine = written.filter(pl.col("record_id").is_in([record_id(i) for i in range(12)]))
    assert set(mine.select("record_id", "ROOMS").rows()) == expected
    counts = result.metrics
    gone = counts["rows_later"] + counts["rows_superseded"] + counts["rows_deleted"]
    assert counts["rows_read"] == written.height + gone == others.height + len(history)


def test_rows_deleted_or_later_are_left_out_and_counted(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(600).with_columns((pl.int_range(pl.len()) % 10 == 0).alias("is_deleted"))
    limit = START + timedelta(minutes=499)
    result = split(ray_session, feature_files(tmp_path / "in", [frame]), tmp_path, as_of=limit.isoformat())
    assert in_order(all_rows(result)).equals(in_order(frame.head(500).filter(~pl.col("is_deleted"))))
    assert (result.metrics["rows_later"], result.metrics["rows_deleted"]) == (100, 50)


def test_kept_duplicates_stay_together(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(300)
    twins = frame.with_columns(pl.col("record_id") + "-1")
    result = split(ray_session, feature_files(tmp_path / "in", [frame, twins]), tmp_path)
    for name in SPLITS:
        ids = rows_of(result, name)["record_id"].str.slice(0, 32).value_counts()
        assert ids["count"].unique().to_list() == [2]


def test_fractions_and_salt_decide(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(3000)
    features = feature_files(tmp_path / "in", [frame])
    result = split(
        ray_session, features, tmp_path, train_size=0.1, validation_size=0.3, test_size=0.6, split_salt="another"
    )
    fractions = split_fraction(hashes_of_ids(frame["record_id"]), "another")
    expected = set(frame.filter(pl.Series((fractions >= 0.1) & (fractions < 0.4)))["record_id"])
    assert set(rows_of(result, "validation")["record_id"]) == expected
    assert len(expected) == pytest.approx(900, abs=100)


def test_an_empty_split_is_explained(ray_session: RaySession, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"no records for .*: of 3 records, train \d.*bring more rows") as caught:
        split(
            ray_session,
            feature_files(tmp_path / "in", [events(3)]),
            tmp_path,
            train_size=0.998,
            validation_size=0.001,
            test_size=0.001,
        )
    assert caught.value.details["rows_read"] == 3
    assert not storage.list_files(str(tmp_path / "prepare_splits"))  # nothing is left behind


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_store_without_live_records_is_explained(ray_session: RaySession, tmp_path: Path, deduplicate: bool) -> None:
    frame = events(5).with_columns(pl.lit(True).alias("is_deleted"))
    with pytest.raises(StepError, match=r"no live records .*5 rows read, 5 deleted"):
        split(ray_session, feature_files(tmp_path / "in", [frame]), tmp_path, deduplicate=deduplicate)
    with pytest.raises(StepError, match="no live records"):
        split(ray_session, Artifact.of(str(tmp_path / "nothing"), []), tmp_path, deduplicate=deduplicate)


def test_a_missing_column_names_file_and_columns(ray_session: RaySession, tmp_path: Path) -> None:
    features = feature_files(tmp_path / "in", [events(50), events(50).drop("VALUE", "ROOMS")])
    with pytest.raises(StepError, match=r"001\.parquet lacks the columns \['VALUE', 'ROOMS'\]"):
        split(ray_session, features, tmp_path)


def test_files_older_than_a_nullable_column_have_it_empty(ray_session: RaySession, tmp_path: Path) -> None:
    frame = events(400)
    older, newer = frame[:200].drop("AREA"), frame[200:]
    for name, files in (("mixed", [older, newer]), ("old", [older, newer.drop("AREA")])):
        result = split(ray_session, feature_files(tmp_path / name, files), tmp_path)
        written = all_rows(result)
        assert written.height == 400
        assert written["AREA"].null_count() >= 200
        assert written.schema["AREA"] == pl.Float64


def test_a_wrong_time_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"as_of\s.*valid datetime"):
        PrepareSplitsParams.model_validate({"table": TABLE, "as_of": "yesterday"})
