"""Small real models, and the registered versions, smoke tests and HTTP calls that the serving tests share."""

from __future__ import annotations

import http.client
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xgboost as xgb

from housing_assets.schema import HOUSING_TABLE
from resources.endpoints.base import SmokeTest
from resources.model_registry.base import GateEvidence, ModelVersion
from resources.model_registry.local import LocalModelRegistry
from step_scripts.model import load_model, save_model
from step_scripts.runner.contract import Artifact
from step_scripts.table.spec import TableSpec


def house_rows(rows: int, seed: int = 0) -> pl.DataFrame:
    """Valid rows of the housing table's features."""
    draw = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "YEAR_BUILT": draw.integers(1872, 2021, rows),
            "SQUARE_FEET": draw.uniform(300, 6000, rows),
            "NUM_BEDROOMS": draw.integers(0, 9, rows),
            "NUM_BATHROOMS": draw.integers(2, 8, rows) / 2,
            "LOT_ACRES": draw.uniform(0.05, 5, rows),
            "GARAGE_SPACES": draw.integers(0, 4, rows),
            "FRONT_PORCH": draw.integers(0, 2, rows),
            "DECK": draw.integers(0, 2, rows),
        }
    )


def small_model(
    folder: Path,
    *,
    factor: float = 100.0,
    rounds: int = 10,
    table: TableSpec = HOUSING_TABLE,
    statistics: dict[str, Any] | None = None,
) -> Artifact:
    """An artifact trained on generated rows; models with other factors predict other prices."""
    frame = house_rows(400).select(table.features)
    matrix = frame.to_numpy().astype(np.float64)
    mean, scale = matrix.mean(axis=0), matrix.std(axis=0)
    target = factor * frame["SQUARE_FEET"].to_numpy()
    data = xgb.DMatrix(((matrix - mean) / scale).astype(np.float32), target)
    booster = xgb.train({"max_depth": 3, "nthread": 1}, data, rounds)
    means, scales = dict(zip(table.features, mean, strict=True)), dict(zip(table.features, scale, strict=True))
    return save_model(
        str(folder),
        booster=booster,
        scaler={"mean": means, "scale": scales, "rows": frame.height},
        table=table,
        statistics=statistics or {},
        parameters={},
        metrics={},
        versions={},
    )


def gate(value: float = 5000.0, *, evaluation: str = "e1") -> GateEvidence:
    """Evidence of a gate with threshold 15000."""
    return GateEvidence(
        passed=value <= 15000, metric="rmse", value=value, threshold=15000, evaluation_digest=evaluation, run_id="run-1"
    )


def registered(registry: LocalModelRegistry, artifact: Artifact, *, approved: bool = True) -> ModelVersion:
    """The next version of group `housing`."""
    evaluation = f"evaluation of {artifact.digest} at {datetime.now(UTC).isoformat()}"
    return registry.register(
        "housing",
        artifact,
        metrics={"rmse": 5000.0},
        gate=gate(evaluation=evaluation),
        lineage={"run_id": "run-1"},
        status="Approved" if approved else "PendingManualApproval",
    )


def smoke_test(artifact: Artifact, rows: int = 12, *, offset: float = 0.0) -> SmokeTest:
    """Rows with the offline predictions of the model, plus `offset`."""
    frame = house_rows(rows, seed=5)
    expected = load_model(artifact.uri).predict(frame) + offset
    lines = frame.write_csv(include_header=False).splitlines()
    return SmokeTest(rows=tuple(lines), expected=tuple(expected.tolist()))


def request(
    port: int, path: str, body: bytes | None = None, *, method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One HTTP request: status, headers (lower-case names) and body. `_` in header names stands for `-`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()
