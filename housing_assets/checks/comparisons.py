"""What a model is compared by: rows whose predictions are known, and the distributions of its training data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from resources.compute.base import table
from resources.endpoints.base import PROBE_ID, Answers, EndpointHost, SmokeTest
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    import polars as pl

    from step_scripts.model import TrainedModel

# Served and offline predictions come from the same float32 model; only the text form of a number may differ.
RELATIVE_TOLERANCE = 1e-5
PSI_THRESHOLD = 0.2  # of the population stability index: the customary limit above which a population counts as shifted


def ask(host: EndpointHost, name: str, test: SmokeTest) -> Answers:
    """Ask for each row in a request of its own. Raises `EndpointNotFound`, `InvocationFailed`."""
    return test.ask(lambda row: host.invoke(name, row, "text/csv", "text/csv", inference_id=PROBE_ID))


def smoke_test_from(model: Artifact, rows: Artifact, count: int) -> SmokeTest:
    """The first `count` rows of `rows` as CSV of raw features, with the predictions of `model` made here."""
    import polars as pl

    from step_scripts.model import load_model

    trained = load_model(model.uri, threads=1)
    frames: list[pl.DataFrame] = []
    for uri in rows.file_uris(".parquet"):
        with storage.open_input(uri) as file:
            frames.append(pl.read_parquet(file, n_rows=count - sum(f.height for f in frames)))
        if sum(f.height for f in frames) >= count:
            break
    return _predicted(trained, pl.concat(frames))


def typical_test(model: Artifact, requests: int) -> SmokeTest:
    """A typical row, so many times."""
    import polars as pl

    from step_scripts.model import load_model

    return _predicted(load_model(model.uri, threads=1), pl.concat([typical_row(model)] * requests))


def typical_row(model: Artifact) -> pl.DataFrame:
    """One row of the training data's medians: valid, whatever the table."""
    import polars as pl

    from step_scripts.table.distributions import quantile

    table, known = table_of(model), distributions(model)
    means = json.loads(storage.read_bytes(model.file_uri("scaler.json")))["mean"]
    values: dict[str, list[float | int]] = {}
    for feature in table.features:
        median = quantile(known[feature], 0.5) if feature in known else math.nan
        typical = median if math.isfinite(median) else float(means[feature])
        values[feature] = [round(typical) if table.column(feature).dtype in ("int64", "bool") else typical]
    return pl.DataFrame(values)


def table_of(model: Artifact) -> TableSpec:
    """The table that a model was trained on."""
    return TableSpec.model_validate_json(storage.read_bytes(model.file_uri("table.json")))


def _predicted(trained: TrainedModel, frame: pl.DataFrame) -> SmokeTest:
    rows = frame.select(trained.table.features)
    return SmokeTest(
        rows=tuple(rows.write_csv(include_header=False).splitlines()),
        expected=tuple(float(value) for value in trained.predict(rows)),
        tolerance=RELATIVE_TOLERANCE,
    )


def distributions(artifact: Artifact) -> dict[str, Any]:
    """Distributions in the training split, by column, as a model or the split's statistics hold them."""
    return json.loads(storage.read_bytes(artifact.file_uri("statistics.json"))).get("distributions", {})


def stability_indices(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """The index of each column that both have."""
    from step_scripts.table.distributions import psi

    return {name: round(psi(before[name], now[name]), 4) for name in now if name in before}


def stability_result(found: Mapping[str, float], reference: str, facts: Mapping[str, Any]) -> dg.AssetCheckResult:
    """A warning if the index of a column is above the threshold. `reference`: the model version compared with."""
    ranked = sorted(found.items(), key=lambda item: -item[1])
    shifted = [column for column, index in found.items() if index > PSI_THRESHOLD]
    known = f"the training data of {reference}"
    return dg.AssetCheckResult(
        passed=not shifted,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"shifted against {known}: {', '.join(shifted)}" if shifted else f"as {known}",
        metadata={
            **facts,
            "threshold": PSI_THRESHOLD,
            "largest_psi": max(found.values(), default=0.0),
            "psi": table([{"column": name, "psi": index} for name, index in ranked]),
        },
    )
