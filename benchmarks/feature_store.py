"""How long does ingestion into SageMaker's feature store take, and how long a `PutRecord` for every row?

`python -m benchmarks.feature_store [--rows 5000] [--delay 0.01] [--store offline]`, on the emulated SageMaker. First
into the offline store, written directly; then into the online store too, by `BatchWriteRecord`, where the service
answers every call after `--delay` seconds. `--store` asks for one of both. Other: Ray actors, as many, that call
`PutRecord` row by row. `seconds`: on a Ray session that is there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.steps import run_step, warm_ray
from housing_assets.sample_data import write_sample
from step_scripts.parameters import IngestionTarget

_RUNTIME = "sagemaker-featurestore-runtime"


@contextmanager
def emulated_service(online: bool, delay: float) -> Iterator[IngestionTarget]:
    """The emulated SageMaker with a feature group `sales`; the ingestion's target. This process talks to it."""
    import boto3

    from housing_assets.schema import HOUSING_TABLE
    from resources.feature_store.sagemaker import SageMakerFeatureStore
    from tests.sagemaker_emulator import SageMakerEmulator
    from tests.sagemaker_emulator.testing import ROLE

    with SageMakerEmulator(feature_group_delay=0.05) as emulator:
        os.environ.update(emulator.environment())
        boto3.client("s3").create_bucket(Bucket="bench")
        store = SageMakerFeatureStore(root="s3://bench/features", role_arn=ROLE, online_store=online, poll_seconds=0.05)
        target = store.ensure_group("sales", HOUSING_TABLE)
        if delay:
            emulator.faults.delay_response("PutRecord", "BatchWriteRecord", after=delay)
        yield target


def by_step(rows_file: str, online: bool, delay: float) -> dict[str, Any]:
    """Step `ingest_features`."""
    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.parameters import IngestFeaturesParams
    from step_scripts.runner.contract import Artifact, file_info

    figures: dict[str, float] = {}
    folder = str(Path(rows_file).parent)
    with emulated_service(online, delay) as target, warm_ray() as session, tempfile.TemporaryDirectory() as scratch:
        rows = Artifact.of(
            folder, [file_info(rows_file, folder, pl.scan_parquet(rows_file).select(pl.len()).collect().item())]
        )
        params = IngestFeaturesParams(table=HOUSING_TABLE, group="sales", target=target)
        with stopwatch(figures):
            done = run_step(session, "ingest_features", params, {"rows": rows}, scratch)
    return {"figures": figures, "result": {"rows": int(done.metrics["rows_readable"])}}


def row_by_row(rows_file: str, online: bool, delay: float) -> dict[str, Any]:
    """One `PutRecord` for each row, from Ray actors."""
    import boto3
    import ray

    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.feature_store.online_client import encoded_records

    class Writer:
        def __init__(self) -> None:
            self._client = boto3.client(_RUNTIME)

        def put(self, records: list[dict[str, str]]) -> int:
            for features in records:
                record = [{"FeatureName": name, "ValueAsString": text} for name, text in features.items()]
                self._client.put_record(FeatureGroupName="sales", Record=record)
            return len(records)

    figures: dict[str, float] = {}
    # Records can be put only into a group with an online store.
    with emulated_service(True, delay), warm_ray() as session, stopwatch(figures):
        actors = int(session.cpus())
        records = encoded_records(pl.read_parquet(rows_file), HOUSING_TABLE)
        writers: list[Any] = [ray.remote(num_cpus=1)(Writer).remote() for _ in range(actors)]
        written = sum(ray.get([writer.put.remote(records[i::actors]) for i, writer in enumerate(writers)]))
    return {"figures": figures, "result": {"rows": written}}


def main(arguments: list[str] | None = None) -> None:
    """Compare both ways in turn."""
    options = parser(__doc__, rows=5000)
    options.add_argument("--delay", type=float, default=0.01, help="delay of each answer; seconds (default 0.01)")
    options.add_argument("--store", choices=["offline", "online"], help="one of both only (default: both)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        sample = write_sample(Path(folder, "sales.csv"), rows=chosen.rows, invalid_fraction=0.0)
        rows_file = str(Path(folder, "rows", "part-00000.parquet"))
        Path(rows_file).parent.mkdir()
        _write_rows(sample, rows_file)
        for name, online, delay in (("offline", False, 0.0), ("online", True, chosen.delay)):
            if chosen.store not in (None, name):
                continue
            work = {"rows_file": rows_file, "online": online, "delay": delay}
            compare(
                f"feature_store_{name}",
                Side("step ingest_features", by_step, work),
                Side("PutRecord for each row", row_by_row, work),
                pairs=chosen.pairs,
                warm_ups=chosen.warm_ups,
                agree={"rows": 0},
                rows=chosen.rows,
                delay=delay,
            )


def _write_rows(sample: Path, rows_file: str) -> None:
    """The file as step `validate_source` would write it."""
    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.table.column_types import polars_schema
    from step_scripts.table.hashes import ids_of_hashes, row_hashes

    frame = pl.read_csv(sample).cast(dict(polars_schema(HOUSING_TABLE).items()))
    moment = pl.datetime(2024, 1, 1, time_unit="us", time_zone="UTC").alias("event_time")
    names = HOUSING_TABLE.column_names
    frame = frame.select(ids_of_hashes(row_hashes(frame, names)), moment, *names)
    frame.write_parquet(rows_file)


if __name__ == "__main__":
    main()
