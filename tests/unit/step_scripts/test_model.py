"""The model artifact: what is written is what predicts, and what does not belong together is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from step_scripts.model import FILES, Scaler, load_model, save_model, xgb
from step_scripts.runner.contract import Artifact
from step_scripts.table.spec import TableSpec
from tests.split_files import TABLE, sales, scaler_of


def small_model(folder: Path, train: pl.DataFrame, table: TableSpec = TABLE) -> Artifact:
    scaler = scaler_of(train)
    matrix = xgb.DMatrix(scaler.transform(train), train["price"].to_numpy())
    booster = xgb.train({"max_depth": 3, "eta": 0.3, "nthread": 1}, matrix, num_boost_round=20)
    return save_model(
        str(folder),
        booster=booster,
        scaler=scaler.to_json(),
        table=table,
        statistics={"rows": train.height},
        parameters={"eta": 0.3},
        metrics={"rmse": 1.5},
        versions={"xgboost": xgb.__version__},
    )


def test_a_loaded_model_predicts_from_raw_features_in_any_order(tmp_path: Path) -> None:
    train = sales(400)
    artifact = small_model(tmp_path / "model", train)
    assert {file.path for file in artifact.files} == set(FILES)
    model = load_model(artifact.uri, threads=1)
    assert model.table == TABLE
    found = model.predict(train)
    assert found.dtype == np.float32
    residual, spread = found - train["price"].to_numpy(), train["price"].to_numpy().std()
    assert residual.std() < spread / 3
    reversed_columns = train.select(reversed(train.columns)).with_columns(pl.lit(1).alias("more"))
    assert (model.predict(reversed_columns) == found).all()
    assert (load_model(artifact.uri).predict(train) == found).all()
    assert json.loads((tmp_path / "model" / "metrics.json").read_text()) == {"rmse": 1.5}


def test_the_scaler_standardizes_and_keeps_what_is_missing() -> None:
    scaler = Scaler.from_json({"mean": {"b": 1.0, "a": 10.0}, "scale": {"a": 2.0, "b": 4.0}}, ("a", "b"))
    frame = pl.DataFrame({"b": [1, None], "a": [14.0, 10.0]})
    assert np.array_equal(scaler.transform(frame), np.array([[2, 0], [0, np.nan]], np.float32), equal_nan=True)
    assert Scaler.from_json(scaler.to_json(), ("a", "b")).to_json() == scaler.to_json()
    with pytest.raises(KeyError, match="c"):
        Scaler.from_json(scaler.to_json(), ("a", "c"))


def test_an_artifact_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    train = sales(100)
    fewer = TABLE.model_copy(update={"columns": tuple(c for c in TABLE.columns if c.name != "age")})
    artifact = small_model(tmp_path / "model", train, fewer)
    with pytest.raises(ValueError, match="the model has 4 features, the table 3"):
        load_model(artifact.uri)
    (tmp_path / "model" / "scaler.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_model(artifact.uri)
