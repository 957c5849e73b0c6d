"""Splits as XGBoost wants them: float32 matrices of scaled features, and the target, read from Parquet files.

Any worker can read its own part: the rows of all files, in order, are cut into one contiguous range a worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from step_scripts.model.artifact import Scaler
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec
from step_scripts.training.boosting import Matrix


@dataclass(frozen=True)
class TrainingSplit:
    """Parquet files of one split, the rows in each, and how their columns become a `Matrix`. Cheap to send around."""

    name: str
    uris: tuple[str, ...]
    file_rows: tuple[int, ...]
    scaler: Scaler
    target: str

    @classmethod
    def of(cls, name: str, artifact: Artifact, scaler: Scaler, target: str) -> TrainingSplit:
        """The split in `artifact`. Raises `StepError` if it holds no rows."""
        files = [f for f in artifact.files if f.path.endswith(".parquet")]
        # Absolute: workers of Ray Train have a working directory of their own.
        places = (storage.join(artifact.uri, f.path) for f in files)
        uris = tuple(uri if storage.is_remote(uri) else str(storage.local_path(uri).absolute()) for uri in places)
        rows = tuple(f.rows or 0 for f in files)
        if sum(rows) == 0:
            raise StepError(f"the {name} split at {artifact.uri} holds no rows: raise its fraction, or bring more data")
        return cls(name, uris, rows, scaler, target)

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(self.file_rows)

    def load(self, rank: int = 0, num_workers: int = 1) -> Matrix:
        """Part `rank` of `num_workers` nearly equal parts; one row group at a time is in memory beside the result.

        Raises `StepError` for a missing column, or a target that is null, infinite or not a number.
        """
        start, stop = self.rows * rank // num_workers, self.rows * (rank + 1) // num_workers
        features = np.empty((stop - start, len(self.scaler.features)), dtype=np.float32)
        target = np.empty(stop - start, dtype=np.float32)
        position = 0
        for frame in self._frames(start, stop):
            end = position + frame.height
            features[position:end] = self.scaler.transform(frame)
            target[position:end] = frame[self.target].cast(pl.Float64).to_numpy()
            position = end
        if bad := int(np.count_nonzero(~np.isfinite(target))):
            raise StepError(
                f"{bad:,} of {counted(len(target), 'row')} of the {self.name} split without a finite {self.target}"
            )
        return Matrix(features, target)

    def _frames(self, start: int, stop: int) -> Iterator[pl.DataFrame]:
        """Rows `start` to `stop` of all files, in order, as frames of at most one row group."""
        columns = [*self.scaler.features, self.target]
        offset = 0
        for uri, rows in zip(self.uris, self.file_rows, strict=True):
            if offset < stop and offset + rows > start:
                yield from _file_frames(uri, columns, start - offset, stop - offset)
            offset += rows


def read_splits(
    inputs: Mapping[str, Artifact], table: TableSpec
) -> tuple[dict[str, Any], TrainingSplit, TrainingSplit]:
    """The content of `scaler.json` in the input `statistics`, and the splits `train` and `validation` scaled by it.

    Raises `StepError` if it lacks a feature or a split holds no rows.
    """
    statistics = inputs["statistics"]
    scaler_json = json.loads(storage.read_bytes(statistics.file_uri("scaler.json")))
    try:
        scaler = Scaler.from_json(scaler_json, table.features)
    except KeyError as error:
        raise StepError(
            f"{statistics.file_uri('scaler.json')} lacks the feature {error}: prepare the splits again"
        ) from error
    train, validation = (TrainingSplit.of(name, inputs[name], scaler, table.target) for name in ("train", "validation"))
    return scaler_json, train, validation


def _file_frames(uri: str, columns: list[str], start: int, stop: int) -> Iterator[pl.DataFrame]:
    filesystem, path = storage.filesystem(uri)
    with filesystem.open_input_file(path) as source:
        file = pq.ParquetFile(source, pre_buffer=storage.is_remote(uri))
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise StepError(f"{uri} lacks the columns {missing}; it has {file.schema_arrow.names}")
        offset = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                frame = pl.from_arrow(file.read_row_group(group, columns=columns))
                assert isinstance(frame, pl.DataFrame)  # a table, so not a series
                yield frame[low:high]
            offset += rows
