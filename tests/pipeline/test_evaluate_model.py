"""Step `evaluate_model` on a small model, against figures computed by hand with numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xgboost as xgb

from step_scripts import evaluate_model
from step_scripts.model import Scaler, load_model, save_model
from step_scripts.parameters import EvaluateModelParams, Slice
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError, StepRequest, StepResult, file_info
from step_scripts.runner.execution import run_step
from step_scripts.runner.ray_session import RaySession
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests.source_steps import CollectingReporter

TABLE = TableSpec(
    name="flats",
    columns=(
        ColumnSpec(name="RENT", dtype="float64"),
        ColumnSpec(name="AREA", dtype="float64"),
        ColumnSpec(name="FLOOR", dtype="int64", nullable=True),
        ColumnSpec(name="TWICE_AREA", dtype="float64"),  # makes the linear system singular
        ColumnSpec(name="FLAT", dtype="string"),
    ),
    target="RENT",
    key_columns=("FLAT",),
)


def rows(count: int, seed: int) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    area = random.uniform(20, 200, count)
    floor = random.integers(0, 30, count)
    rent = 10 * area + 5 * floor + 3e-4 * area**3 + random.normal(0, 30, count)
    rent[:3] = 0.0
    return pl.DataFrame(
        {
            "record_id": [f"{seed:08x}{int(r):016x}{i:08x}" for i, r in enumerate(random.integers(0, 2**63, count))],
            "RENT": rent,
            "AREA": area,
            "FLOOR": floor,
            "TWICE_AREA": 2 * area,
            "FLAT": [f"{i}" for i in range(count)],
        }
    ).with_columns(pl.when(pl.col("FLOOR") != 13).then("FLOOR").alias("FLOOR"))


TRAIN, TEST = rows(3000, 1), rows(1500, 2)


def split_files(folder: Path, frames: list[pl.DataFrame]) -> Artifact:
    folder.mkdir(parents=True)
    infos = []
    for index, frame in enumerate(frames):
        path = folder / f"part-{index:05}.parquet"
        frame.write_parquet(path)
        infos.append(file_info(str(path), str(folder), frame.height))
    return Artifact.of(str(folder), infos)


def trained(folder: Path, table: TableSpec = TABLE, *, max_depth: int = 3) -> Artifact:
    means = {name: TRAIN[name].cast(pl.Float64).mean() for name in table.features}
    scales = {name: TRAIN[name].cast(pl.Float64).std(ddof=0) for name in table.features}
    scaler = Scaler.from_json({"mean": means, "scale": scales}, table.features)
    matrix = xgb.DMatrix(scaler.transform(TRAIN), TRAIN["RENT"].to_numpy())
    booster = xgb.train({"max_depth": max_depth, "eta": 0.3, "nthread": 1}, matrix, num_boost_round=20)
    return save_model(
        str(folder),
        booster=booster,
        scaler=scaler.to_json(),
        table=table,
        statistics={},
        parameters={},
        metrics={},
        versions={},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return trained(tmp_path_factory.mktemp("model"))


def evaluate(
    session: RaySession,
    root: Path,
    model: Artifact,
    *,
    train: Artifact | None = None,
    test: Artifact | None = None,
    log: CollectingReporter | None = None,
    table: TableSpec = TABLE,
    extra: dict[str, Artifact] | None = None,
    **params: Any,
) -> StepResult:
    chosen = EvaluateModelParams(table=table, **params)
    inputs = {
        "model": model,
        "train": train or split_files(root / "train", [TRAIN[:1000], TRAIN[1000:]]),
        "test": test or split_files(root / "test", [TEST[:400], TEST[400:]]),
        **(extra or {}),
    }
    request = StepRequest(
        step="evaluate_model",
        params=chosen.model_dump(mode="json"),
        inputs=inputs,
        output_root=str(root),
        code_version="test",
    )
    return run_step(request, log or CollectingReporter(), session)


def report_of(result: StepResult, name: str = "evaluation.json") -> Any:
    return json.loads(storage.read_bytes(result.outputs["report"].file_uri(name)))


def test_metrics_equal_those_computed_by_hand(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    log = CollectingReporter()
    result = evaluate(ray_session, tmp_path, model, log=log)
    actual = TEST["RENT"].to_numpy()
    predicted = load_model(model.uri).predict(TEST).astype(float)
    error = predicted - actual
    expected = {
        "rmse": np.sqrt(np.mean(error**2)),
        "mse": np.mean(error**2),
        "mae": np.mean(np.abs(error)),
        "r2": 1 - np.sum(error**2) / np.sum((actual - actual.mean()) ** 2),
        "mape": np.mean(np.abs(error[actual != 0] / actual[actual != 0])),
        "median_absolute_error": np.median(np.abs(error)),
        "max_error": np.max(np.abs(error)),
        "bias": np.mean(error),
    }
    report = report_of(result)
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-9), name
        assert report["regression_metrics"][name]["value"] == result.metrics[name]
    assert report["rows"] == result.metrics["test_rows"] == 1500
    assert report["rows_with_target_zero"] == 3
    for percent in (1, 5, 25, 50, 75, 95, 99):
        assert report["residual_quantiles"][f"{percent}%"] == pytest.approx(np.percentile(-error, percent), rel=1e-9)
    assert report["model_digest"] == model.digest
    assert report["test_digest"] == result.inputs["test"].digest
    assert log.messages[-1].startswith("evaluate_model: 1,500 of 1,500 rows")


def test_standard_deviations_are_near_those_of_a_bootstrap(
    ray_session: RaySession, tmp_path: Path, model: Artifact
) -> None:
    result = evaluate(ray_session, tmp_path, model)
    actual = TEST["RENT"].to_numpy()
    error = load_model(model.uri).predict(TEST).astype(float) - actual
    random = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        chosen = random.integers(0, len(error), len(error))
        e, a = error[chosen], actual[chosen]
        draws.append((np.sqrt(np.mean(e**2)), np.mean(np.abs(e)), 1 - np.sum(e**2) / np.sum((a - a.mean()) ** 2)))
    metrics = report_of(result)["regression_metrics"]
    for name, spread in zip(("rmse", "mae", "r2"), np.std(draws, axis=0), strict=True):
        assert metrics[name]["standard_deviation"] == pytest.approx(spread, rel=0.15), name
    assert metrics["max_error"]["standard_deviation"] == "NaN"


def test_baselines_equal_numpy(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    result = evaluate(ray_session, tmp_path, model)
    floor = TRAIN["FLOOR"].mean()
    matrices = [
        np.column_stack([np.ones(f.height), f["AREA"], f["FLOOR"].fill_null(floor), f["TWICE_AREA"]])
        for f in (
            TRAIN.with_columns(pl.col("FLOOR").cast(pl.Float64)),
            TEST.with_columns(pl.col("FLOOR").cast(pl.Float64)),
        )
    ]
    solution, *_ = np.linalg.lstsq(matrices[0], TRAIN["RENT"].to_numpy(), rcond=None)
    actual = TEST["RENT"].to_numpy()
    linear = np.sqrt(np.mean((matrices[1] @ solution - actual) ** 2))
    mean = np.sqrt(np.mean((TRAIN["RENT"].to_numpy().mean() - actual) ** 2))
    assert result.metrics["baseline_linear_rmse"] == pytest.approx(linear, rel=1e-9)
    assert result.metrics["baseline_mean_rmse"] == pytest.approx(mean, rel=1e-9)
    assert result.metrics["rmse"] < linear < mean
    assert "champion_rmse" not in result.metrics
    assert [row["predictor"] for row in result.details["comparison"]] == ["this model", "linear model", "mean of train"]


def test_slices_by_width_and_by_bands(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    slices = (Slice(name="floors", column="FLOOR", width=10), Slice(name="rent", column="RENT", bands=4))
    result = evaluate(ray_session, tmp_path, model, slices=slices)
    frame = TEST.with_columns(pl.Series("error", load_model(model.uri).predict(TEST).astype(float)) - pl.col("RENT"))
    found = {(row["slice"], row["group"]): row for row in report_of(result)["slices"]}

    floors = [group for name, group in found if name == "floors"]
    assert floors == ["missing", "0 to 9", "10 to 19", "20 to 29"]
    tens = frame.filter(pl.col("FLOOR").is_between(10, 19))
    row = found["floors", "10 to 19"]
    assert row["rows"] == tens.height
    assert row["rmse"] == pytest.approx(np.sqrt((tens["error"].to_numpy() ** 2).mean()), rel=1e-9)
    assert row["bias"] == pytest.approx(tens["error"].mean(), rel=1e-9)

    bands = [row for (name, _), row in found.items() if name == "rent"]
    assert [row["rows"] for row in bands] == pytest.approx([375] * 4, abs=1)
    assert bands[0]["group"].startswith("up to ")
    assert bands[-1]["group"].startswith("over ")
    first = frame.filter(pl.col("RENT") <= frame["RENT"].quantile(0.25, "linear"))
    assert bands[0]["mae"] == pytest.approx(first["error"].abs().mean(), rel=1e-9)
    for shown in result.details["slices"]:
        exact = found[shown["slice"], shown["group"]]
        assert [shown[k] for k in ("rows", "rmse", "bias")] == pytest.approx(
            [exact[k] for k in ("rows", "rmse", "bias")], rel=1e-5
        )


def test_a_group_without_percentages_says_so(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    test = split_files(tmp_path / "zero", [TEST.with_columns(pl.lit(0.0).alias("RENT"))])
    result = evaluate(ray_session, tmp_path, model, test=test, slices=(Slice(name="a", column="AREA", bands=2),))
    report = report_of(result)
    assert report["regression_metrics"]["mape"] == {"value": "NaN", "standard_deviation": "NaN"}
    assert report["regression_metrics"]["r2"]["value"] == "NaN"
    assert not {"mape", "r2"} & set(result.metrics)
    assert [row["mape"] for row in report["slices"]] == [None, None]
    assert [row["mape"] for row in result.details["slices"]] == ["n/a", "n/a"]


def test_champion_is_evaluated_on_the_same_rows(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    champion = trained(tmp_path / "champion", max_depth=1)
    result = evaluate(ray_session, tmp_path, model, extra={"champion": champion})
    error = load_model(champion.uri).predict(TEST).astype(float) - TEST["RENT"].to_numpy()
    assert result.metrics["champion_rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
    assert report_of(result)["champion"]["model_digest"] == champion.digest


def test_a_champion_of_another_table_is_left_out_with_a_reason(
    ray_session: RaySession, tmp_path: Path, model: Artifact
) -> None:
    smaller = TABLE.model_copy(update={"columns": tuple(c for c in TABLE.columns if c.name != "FLOOR")})
    log = CollectingReporter()
    champion = model
    candidate = trained(tmp_path / "smaller", smaller)
    test = split_files(tmp_path / "narrow", [TEST.drop("FLOOR")])
    train = split_files(tmp_path / "narrow_train", [TRAIN.drop("FLOOR")])
    result = evaluate(
        ray_session,
        tmp_path,
        candidate,
        train=train,
        test=test,
        table=smaller,
        extra={"champion": champion},
        log=log,
    )
    assert "champion_rmse" not in result.metrics
    assert "FLOOR" in report_of(result)["champion"]["remark"]
    assert "cannot be compared: it needs the features ['FLOOR']" in log.warnings[0]


def test_plotted_rows_are_a_fixed_sample(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    first = evaluate(ray_session, tmp_path / "a", model, plotted_rows=100)
    backwards = split_files(tmp_path / "backwards", [TEST.reverse()[i::3] for i in range(3)])
    second = evaluate(ray_session, tmp_path / "b", model, test=backwards, plotted_rows=100)
    predictions = report_of(first, "predictions.json")
    assert predictions == report_of(second, "predictions.json") == first.details["predictions"]
    assert len(predictions["actual"]) == len(predictions["predicted"]) == 100
    assert set(predictions["actual"]) <= set(TEST["RENT"].to_list())
    assert first.metrics["rmse"] == pytest.approx(second.metrics["rmse"], rel=1e-12)


def test_beyond_the_limit_quantiles_come_from_a_sample(
    ray_session: RaySession, tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = evaluate(ray_session, tmp_path / "a", model)
    monkeypatch.setattr(evaluate_model, "MOST_EXACT_ROWS", 750)
    sampled = evaluate(ray_session, tmp_path / "b", model)
    assert report_of(exact)["rows_for_quantiles"] == 1500
    assert report_of(sampled)["rows_for_quantiles"] == pytest.approx(750, abs=100)
    for name in ("rmse", "mae", "r2", "mape", "max_error", "bias"):
        assert sampled.metrics[name] == exact.metrics[name], name
    assert sampled.metrics["median_absolute_error"] == pytest.approx(exact.metrics["median_absolute_error"], rel=0.15)


def test_rows_without_a_target_are_left_out_and_counted(
    ray_session: RaySession, tmp_path: Path, model: Artifact
) -> None:
    holes = TEST.with_columns(pl.when(pl.int_range(pl.len()) >= 10).then("RENT").alias("RENT"))
    result = evaluate(ray_session, tmp_path, model, test=split_files(tmp_path / "holes", [holes]))
    assert result.metrics["rows_without_target"] == 10
    assert result.metrics["test_rows"] == 1490


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (Slice(name="s", column="GARDEN", bands=2), "there is no column GARDEN"),
        (Slice(name="s", column="FLAT", bands=2), "column FLAT is not numeric"),
        (Slice(name="s", column="AREA"), "give either `width` or `bands`"),
        (Slice(name="s", column="AREA", width=0.01), "makes more than 200 groups; choose a larger width"),
    ],
)
def test_slices_that_cannot_be_made(
    ray_session: RaySession, tmp_path: Path, model: Artifact, slices: Slice, message: str
) -> None:
    with pytest.raises(StepError, match=message):
        evaluate(ray_session, tmp_path, model, slices=(slices,))


def test_inputs_that_do_not_fit_are_explained(ray_session: RaySession, tmp_path: Path, model: Artifact) -> None:
    with pytest.raises(StepError, match=r"the test split at .* holds no rows"):
        evaluate(ray_session, tmp_path / "a", model, test=split_files(tmp_path / "empty", [TEST[:0]]))
    with pytest.raises(StepError, match=r"part-00000\.parquet lacks the columns \['AREA'\]"):
        evaluate(ray_session, tmp_path / "b", model, test=split_files(tmp_path / "narrow", [TEST.drop("AREA")]))
    other = TABLE.model_copy(update={"target": "AREA"})
    with pytest.raises(StepError, match="predicts RENT, the table's target is AREA"):
        evaluate(ray_session, tmp_path / "c", model, table=other)
