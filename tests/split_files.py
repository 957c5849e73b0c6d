"""Small splits on disk, as step `prepare_splits` leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from step_scripts.model import Scaler
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, file_info
from step_scripts.table.spec import ColumnSpec, TableSpec
from step_scripts.training.boosting import TrainingSplit

TABLE = TableSpec(
    name="sales",
    columns=(
        ColumnSpec(name="area", dtype="float64"),
        ColumnSpec(name="rooms", dtype="int64"),
        ColumnSpec(name="price", dtype="float64"),
        ColumnSpec(name="age", dtype="float64", nullable=True),
        ColumnSpec(name="garden", dtype="bool"),
    ),
    target="price",
)


def sales(rows: int, seed: int = 0) -> pl.DataFrame:
    """A table with non-linear prices, noise and some unknown ages."""
    random = np.random.default_rng(seed)
    area, rooms, age = random.uniform(20, 400, rows), random.integers(1, 9, rows), random.uniform(0, 120, rows)
    garden = random.random(rows) < 0.4
    price = 900 * area * (1 + np.exp(-age / 30)) + 8000 * np.minimum(rooms, 4) + 30_000 * garden * (area > 150)
    known = random.random(rows) < 0.95
    return pl.DataFrame(
        {
            "record_id": [f"{seed:08x}{i:024x}" for i in range(rows)],
            "area": area,
            "rooms": rooms,
            "price": price + random.normal(0, 5000, rows),
            "age": [value if keep else None for value, keep in zip(age.tolist(), known.tolist(), strict=True)],
            "garden": garden,
        },
        schema_overrides={"rooms": pl.Int64},
    )


def write_split(folder: Path, frame: pl.DataFrame, files: int = 1, row_group_size: int | None = None) -> Artifact:
    """`frame` as `part-NNNNN.parquet` files of nearly equal size."""
    folder.mkdir(parents=True)
    infos = []
    for i in range(files):
        part = frame[frame.height * i // files : frame.height * (i + 1) // files]
        path = folder / f"part-{i:05d}.parquet"
        part.write_parquet(path, row_group_size=row_group_size)
        infos.append(file_info(str(path), str(folder), part.height))
    return Artifact.of(str(folder), infos)


def scaler_of(frame: pl.DataFrame) -> Scaler:
    """Standardization by the statistics of `frame`."""
    columns = [frame[name].cast(pl.Float64).drop_nulls().to_numpy() for name in TABLE.features]
    return Scaler(TABLE.features, np.array([c.mean() for c in columns]), np.array([c.std() or 1.0 for c in columns]))


def write_inputs(folder: Path, train: pl.DataFrame, validation: pl.DataFrame, files: int = 1) -> dict[str, Artifact]:
    """Inputs of step `tune_model`."""
    statistics = folder / "statistics"
    storage.write_json(str(statistics / "scaler.json"), {**scaler_of(train).to_json(), "rows": train.height})
    storage.write_json(str(statistics / "statistics.json"), {"rows": train.height})
    infos = [file_info(str(statistics / name), str(statistics)) for name in ("scaler.json", "statistics.json")]
    return {
        "train": write_split(folder / "train", train, files),
        "validation": write_split(folder / "validation", validation, files),
        "statistics": Artifact.of(str(statistics), infos),
    }


def splits_of(inputs: dict[str, Artifact], train: pl.DataFrame) -> tuple[TrainingSplit, TrainingSplit]:
    """The training and the validation split of `inputs`."""
    scaler = scaler_of(train)
    train_split, validation_split = (
        TrainingSplit.of(name, inputs[name], scaler, TABLE.target) for name in ("train", "validation")
    )
    return train_split, validation_split
