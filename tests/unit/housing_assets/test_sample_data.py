"""The sample generator."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xgboost as xgb

from housing_assets.sample_data import MODIFIED, generate_sales, main, write_sample
from housing_assets.schema import HOUSING_TABLE
from step_scripts.table.column_types import polars_schema, violations


def test_same_seed_same_bytes_and_time(tmp_path: Path) -> None:
    first = write_sample(tmp_path / "a" / "sales.csv", rows=1000, seed=7)
    second = write_sample(tmp_path / "b.csv", rows=1000, seed=7)
    other = write_sample(tmp_path / "c.csv", rows=1000, seed=8)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert first.stat().st_mtime == MODIFIED.timestamp()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_bytes_do_not_change_between_versions(tmp_path: Path) -> None:
    content = write_sample(tmp_path / "sales.csv", rows=10_000).read_bytes()
    assert hashlib.sha256(content).hexdigest() == GOLDEN_SHA256


def test_fewer_rows_are_the_beginning_of_more(tmp_path: Path) -> None:
    short = write_sample(tmp_path / "short.csv", rows=60_000).read_bytes()
    long = write_sample(tmp_path / "long.csv", rows=60_100).read_bytes()
    assert long.startswith(short)
    assert long.count(b"\n") == 60_101


def test_rows_conform_to_the_schema(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "sales.csv", rows=20_000, invalid_fraction=0)
    frame = pl.read_csv(path, schema=polars_schema(HOUSING_TABLE))
    assert tuple(frame.columns) == HOUSING_TABLE.column_names
    assert violations(frame, HOUSING_TABLE).is_empty()
    assert frame.n_unique() == 20_000
    assert 400_000 < frame["PRICE"].to_numpy().mean() < 460_000


def test_share_of_invalid_rows(tmp_path: Path) -> None:
    valid = write_sample(tmp_path / "valid.csv", rows=20_000, invalid_fraction=0).read_text().splitlines()
    mixed = write_sample(tmp_path / "mixed.csv", rows=20_000, invalid_fraction=0.01).read_text().splitlines()
    assert len(mixed) == len(valid)
    changed = sum(a != b for a, b in zip(valid, mixed, strict=True))
    assert 150 < changed < 250
    assert any(",unknown," in line for line in mixed)


def test_prices_need_more_than_a_linear_model() -> None:
    """Trees reach about 10,000 dollars, least squares does not come near."""
    sales = generate_sales(np.random.default_rng(1), 10_000)
    features = sales.select(HOUSING_TABLE.features).to_numpy().astype(float)
    price = sales["PRICE"].to_numpy().astype(float)
    train, validation, test = slice(0, 6000), slice(6000, 8000), slice(8000, 10_000)
    design = np.column_stack([np.ones(len(price)), features])
    weights = np.linalg.lstsq(design[train], price[train], rcond=None)[0]
    linear = float(np.sqrt(np.mean((design[test] @ weights - price[test]) ** 2)))
    booster = xgb.train(
        {"max_depth": 4, "eta": 0.25, "nthread": 2},
        xgb.DMatrix(features[train], price[train]),
        200,
        evals=[(xgb.DMatrix(features[validation], price[validation]), "validation")],
        early_stopping_rounds=20,
        verbose_eval=False,
    )
    trees = float(np.sqrt(np.mean((booster.predict(xgb.DMatrix(features[test])) - price[test]) ** 2)))
    assert 7_000 < trees < 12_000
    assert linear > 20_000


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "sales.csv"
    arguments = ["--rows", "100", "--seed", "3", "--out", str(out), "--invalid-fraction", "0"]
    subprocess.run([sys.executable, "-m", "housing_assets.sample_data", *arguments], check=True)
    assert out.read_bytes() == write_sample(tmp_path / "b.csv", rows=100, seed=3, invalid_fraction=0).read_bytes()


@pytest.mark.parametrize(
    ("option", "message"), [("--rows=0", "at least 1"), ("--invalid-fraction=2", "between 0 and 1")]
)
def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "sales.csv"), option])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


GOLDEN_SHA256 = "4a53f91113b04f368073db7d06e8d1fbcf47e64936e910d760d9ff7b63a4ff4d"
