"""Running the platform's steps on a Ray session of this process, and the tables and splits that they work on."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from housing_assets.sample_data import write_sample
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepParams, StepRequest, StepResult, file_info

# At the beginning Ray starts more workers than it needs at once.
_SECONDS_TO_SETTLE = 1.0
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}
TARGET = "PRICE"
SILENT = logging.Logger("silent", logging.CRITICAL)
"""Takes a step's messages and says nothing."""


@contextmanager
def warm_ray(*modules: str) -> Iterator[Any]:
    """A private Ray session whose workers have started, as earlier steps of a run leave it.

    This process and the workers have imported `modules`.
    """
    import ray

    from step_scripts.runner.ray_session import RaySession, RaySettings

    session = RaySession(RaySettings())
    session.ensure()
    try:
        import_all(modules)
        wait = ray.remote(import_all)
        for _ in range(2):
            ray.get([wait.remote(modules) for _ in range(int(ray.cluster_resources()["CPU"]))])
            time.sleep(_SECONDS_TO_SETTLE)
        yield session
    finally:
        session.stop()


def import_all(modules: Sequence[str]) -> None:
    """Import modules by their names."""
    for module in modules:
        importlib.import_module(module)


def run_step(
    session: Any, step: str, params: StepParams, inputs: Mapping[str, Artifact], folder: str | Path
) -> StepResult:
    """Run one step through the platform's runner; outputs go below `folder`."""
    from step_scripts.runner.execution import run_step as run

    request = StepRequest(
        step=step,
        params=params.model_dump(mode="json"),
        inputs=dict(inputs),
        output_root=str(folder),
        code_version="benchmark",
    )
    return run(request, SILENT, session)


def write_splits(folder: Path, rows: int) -> dict[str, Artifact]:
    """Generated sales as the inputs of step `tune_model`, without the steps before it. Kept in `folder`."""
    sample = write_sample(folder / "sales.csv", rows=rows, invalid_fraction=0.0)
    frame = pl.read_csv(sample).cast(pl.Float64)
    frame = frame.with_columns(record_id=pl.Series([f"{i:032x}" for i in range(rows)]))
    inputs: dict[str, Artifact] = {}
    first = 0
    for name, fraction in SPLITS.items():
        last = rows if name == "test" else first + round(rows * fraction)
        path = folder / name / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        frame[first:last].write_parquet(path, row_group_size=250_000)
        inputs[name] = Artifact.of(str(path.parent), [file_info(str(path), str(path.parent), last - first)])
        first = last
    train = frame[: inputs["train"].rows]
    features = [name for name in train.columns if name not in ("record_id", TARGET)]
    scaler = {
        "mean": {name: float(np.mean(train[name].to_numpy())) for name in features},
        "scale": {name: float(np.std(train[name].to_numpy())) or 1.0 for name in features},
        "rows": train.height,
    }
    statistics = folder / "statistics"
    for name, content in (("scaler.json", scaler), ("statistics.json", {"rows": train.height})):
        storage.write_json(str(statistics / name), content)
    infos = [file_info(str(statistics / name), str(statistics)) for name in ("scaler.json", "statistics.json")]
    inputs["statistics"] = Artifact.of(str(statistics), infos)
    (folder / "inputs.json").write_text("{" + ",".join(f'"{k}":{v.model_dump_json()}' for k, v in inputs.items()) + "}")
    return inputs


def read_inputs(folder: str) -> dict[str, Artifact]:
    """What `write_splits` left in `folder`."""
    import json

    described = json.loads(Path(folder, "inputs.json").read_bytes())
    return {name: Artifact.model_validate(value) for name, value in described.items()}


def scaled_split(folder: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and target of a split, scaled by polars alone: what a plain script would do."""
    import json

    scaler = json.loads(Path(folder, "statistics", "scaler.json").read_bytes())
    features = list(scaler["mean"])
    columns = [
        ((pl.col(f).cast(pl.Float64) - scaler["mean"][f]) / scaler["scale"][f]).cast(pl.Float32) for f in features
    ]
    frame = pl.scan_parquet(str(Path(folder, name, "*.parquet"))).select(
        *columns, pl.col(TARGET).cast(pl.Float32)
    ).collect()  # fmt: skip
    return frame.select(features).to_numpy(), frame[TARGET].to_numpy()
