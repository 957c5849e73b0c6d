"""Reading splits into matrices."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_scripts.runner.contract import StepError
from step_scripts.training.boosting import TrainingSplit
from tests.split_files import TABLE, sales, scaler_of, write_split


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    files=st.integers(1, 5),
    row_group_size=st.integers(1, 20),
    num_workers=st.integers(1, 7),
)
def test_parts_of_all_workers_are_the_split_in_order(
    rows: int, files: int, row_group_size: int, num_workers: int
) -> None:
    frame = sales(rows)
    scaler = scaler_of(frame)
    with tempfile.TemporaryDirectory() as folder:
        artifact = write_split(Path(folder) / "train", frame, files, row_group_size)
        split = TrainingSplit.of("train", artifact, scaler, TABLE.target)
        parts = [split.load(rank, num_workers) for rank in range(num_workers)]
    sizes = [len(part.target) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(np.concatenate([p.features for p in parts]), scaler.transform(frame))
    np.testing.assert_array_equal(np.concatenate([p.target for p in parts]), frame["price"].cast(pl.Float32).to_numpy())


def test_unknown_values_become_nan(tmp_path: Path) -> None:
    frame = sales(200)
    matrix = TrainingSplit.of("train", write_split(tmp_path / "t", frame), scaler_of(frame), "price").load()
    assert matrix.features.dtype == np.float32
    unknown = frame["age"].is_null().to_numpy()
    assert unknown.any()
    np.testing.assert_array_equal(np.isnan(matrix.features[:, TABLE.features.index("age")]), unknown)


def test_empty_split_is_refused(tmp_path: Path) -> None:
    frame = sales(5)
    with pytest.raises(StepError, match=r"the validation split at .* holds no rows"):
        TrainingSplit.of("validation", write_split(tmp_path / "v", frame[:0]), scaler_of(frame), "price")


def test_missing_column_is_named(tmp_path: Path) -> None:
    frame = sales(5)
    split = TrainingSplit.of("train", write_split(tmp_path / "t", frame.drop("rooms")), scaler_of(frame), "price")
    with pytest.raises(StepError, match=r"part-00000.parquet lacks the columns \['rooms'\]"):
        split.load()


def test_rows_without_target_are_counted(tmp_path: Path) -> None:
    frame = sales(5).with_columns(price=pl.Series([1.0, None, float("inf"), 2.0, float("nan")]))
    split = TrainingSplit.of("train", write_split(tmp_path / "t", frame), scaler_of(frame), "price")
    with pytest.raises(StepError, match="3 of 5 rows of the train split without a finite price"):
        split.load()
