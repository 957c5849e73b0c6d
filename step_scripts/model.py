"""The model artifact, which training writes and everything that predicts reads, and XGBoost's native interface.

An artifact is all that is needed to predict from raw features, in open formats. Files: `model.ubj` (XGBoost's UBJSON),
`scaler.json` (mean and scale of each feature, fitted on the training split), `table.json` (the `TableSpec`),
`statistics.json` (distributions in the training split), `parameters.json`, `metrics.json`, `versions.json`. Nothing in
it is executed on loading.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, file_info
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

# XGBoost with its native interface only. Steps import it from here, before anything else imports it: `import xgboost`
# imports scikit-learn wherever it is installed, as the base of a second interface that no step uses. Every driver,
# worker and server would pay for it: 3.0 s instead of 0.6 s of import (2 cores, xgboost 3.2.0).
# Unless it has been imported already, `import sklearn` fails for as long as None stands there, as is documented.
sys.modules.setdefault("sklearn", None)  # pyright: ignore[reportArgumentType]
try:
    import xgboost as xgb
    from xgboost.callback import TrainingCallback as TrainingCallback
finally:
    if sys.modules["sklearn"] is None:
        del sys.modules["sklearn"]

_DESCRIPTIONS = ("scaler", "table", "statistics", "parameters", "metrics", "versions")
FILES = ("model.ubj", *(f"{name}.json" for name in _DESCRIPTIONS))


@dataclass(frozen=True)
class Scaler:
    """Standardization by the training split's statistics: `(x - mean) / scale`, one value of each a feature."""

    features: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def from_json(cls, value: dict[str, Any], features: tuple[str, ...]) -> Scaler:
        """From `{"mean": {feature: x}, "scale": {feature: x}}`. Raises `KeyError` if a feature is missing."""
        mean = np.array([value["mean"][name] for name in features], dtype=np.float64)
        scale = np.array([value["scale"][name] for name in features], dtype=np.float64)
        return cls(features, mean, scale)

    def transform(self, frame: pl.DataFrame) -> np.ndarray:
        """Raw features to the model's input: float32, shape (rows, features), nulls as NaN."""
        scaled = [
            ((frame[name].cast(pl.Float64).to_numpy() - mean) / scale).astype(np.float32)
            for name, mean, scale in zip(self.features, self.mean, self.scale, strict=True)
        ]
        return np.column_stack(scaled) if scaled else np.empty((frame.height, 0), np.float32)

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return {
            "mean": dict(zip(self.features, self.mean.tolist(), strict=True)),
            "scale": dict(zip(self.features, self.scale.tolist(), strict=True)),
        }


@dataclass(frozen=True)
class TrainedModel:
    """A loaded artifact."""

    booster: xgb.Booster
    scaler: Scaler
    table: TableSpec

    def predict(self, frame: pl.DataFrame) -> np.ndarray:
        """Predictions, float32, one a row, from a frame that holds the raw features (in any order, with any others)."""
        return self.booster.inplace_predict(self.scaler.transform(frame), validate_features=False)


def save_model(
    uri: str,
    *,
    booster: xgb.Booster,
    scaler: dict[str, Any],
    table: TableSpec,
    statistics: dict[str, Any],
    parameters: dict[str, Any],
    metrics: dict[str, Any],
    versions: dict[str, str],
) -> Artifact:
    """Write the files of an artifact below `uri` and return it. The caller commits it."""
    storage.write_bytes(storage.join(uri, "model.ubj"), bytes(booster.save_raw("ubj")))
    described = (scaler, table.model_dump(mode="json"), statistics, parameters, metrics, versions)
    for name, value in zip(_DESCRIPTIONS, described, strict=True):
        storage.write_json(storage.join(uri, f"{name}.json"), value)
    return Artifact.of(uri, [file_info(storage.join(uri, name), uri) for name in FILES])


def load_model(uri: str, *, threads: int | None = None) -> TrainedModel:
    """The artifact below `uri`. Raises `FileNotFoundError`, or `ValueError` if a file is not what it should be."""
    booster = xgb.Booster()
    booster.load_model(bytearray(storage.read_bytes(storage.join(uri, "model.ubj"))))
    if threads is not None:
        booster.set_param({"nthread": threads})
    table = TableSpec.model_validate_json(storage.read_bytes(storage.join(uri, "table.json")))
    scaler = Scaler.from_json(json.loads(storage.read_bytes(storage.join(uri, "scaler.json"))), table.features)
    if booster.num_features() != len(table.features):
        features = counted(booster.num_features(), "feature")
        raise ValueError(f"{uri}: the model has {features}, the table {len(table.features)}")
    return TrainedModel(booster, scaler, table)
