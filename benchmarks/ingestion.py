"""How long does it take to get from CSV to validated rows, a feature store and splits with statistics?

`python -m benchmarks.ingestion [--rows 1000000] [--against polars|ray_data]`. The other side does the same work: the
schema's rules, a list of rejected rows, record ids, duplicates out, a stored Parquet data set, three splits by a hash
of the id, and mean and standard deviation of the training rows. `seconds`: on a Ray session that is there, with modules
imported on both sides.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.steps import SPLITS, run_step, warm_ray
from housing_assets.sample_data import write_sample

_MODULES = (*(f"step_scripts.{s}" for s in ("validate_source", "ingest_features", "prepare_splits")), "pandera.polars")


def steps(source: str) -> dict[str, Any]:
    """The platform's three steps and its local feature store."""
    from housing_assets.schema import HOUSING_TABLE
    from resources.feature_store.local import LocalFeatureStore
    from resources.sources.listing import list_source
    from step_scripts.parameters import IngestFeaturesParams, PrepareSplitsParams, ValidateSourceParams

    figures: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="housing-bench-") as folder,
        warm_ray(*_MODULES) as session,
        stopwatch(figures),
    ):
        params = ValidateSourceParams(table=HOUSING_TABLE, files=tuple(list_source(source).files))
        validated = run_step(session, "validate_source", params, {}, folder)
        store = LocalFeatureStore(root=f"{folder}/features")
        target = store.ensure_group("sales", HOUSING_TABLE)
        ingest = IngestFeaturesParams(table=HOUSING_TABLE, group="sales", target=target)
        ingested = run_step(session, "ingest_features", ingest, {"rows": validated.outputs["rows"]}, folder)
        split = PrepareSplitsParams(table=HOUSING_TABLE, deduplicate=bool(ingested.details["deduplicate"]))
        done = run_step(session, "prepare_splits", split, {"features": ingested.outputs["features"]}, folder)
    rows = sum(done.metrics[f"{name}_rows"] for name in SPLITS)
    return {"figures": figures, "result": _result(rows, done.metrics["train_rows"])}


def with_polars(source: str) -> dict[str, Any]:
    """The same work by polars alone."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder, stopwatch(figures):
        counts, _ = polars_splits(source, Path(folder))
    return {"figures": figures, "result": _result(sum(counts.values()), counts["train"])}


def polars_splits(source: str, folder: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Write rejected rows, the store and three splits; rows of each split, and the statistics of the training rows."""
    import polars as pl

    types, rules = _rules()
    rows = pl.read_csv(source, schema=types, ignore_errors=True, row_index_name="line").with_columns(valid=rules)
    rows.filter(~pl.col("valid")).write_csv(folder / "rejected.csv")
    columns = list(types)
    valid = (
        rows.filter("valid")
        .select(*columns)
        .with_columns(
            pl.struct(columns).hash(seed=1).alias("low"),
            pl.struct(columns).hash(seed=2).alias("high"),
        )
        .unique(["low", "high"], keep="first")
        .with_columns(record_id=pl.format("{}-{}", "high", "low"), event_time=pl.lit(0).cast(pl.Datetime("us")))
    )
    valid.drop("low", "high").write_parquet(folder / "store.parquet", compression="zstd", compression_level=1)
    side = (pl.col("low") % 1000) / 1000.0
    bounds = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
    counts: dict[str, int] = {}
    statistics: dict[str, float] = {}
    for split, (low, high) in bounds.items():
        part = valid.filter((side >= low) & (side < high)).select("record_id", *columns)
        part.write_parquet(folder / f"{split}.parquet", compression="zstd", compression_level=1)
        counts[split] = part.height
        if split == "train":
            means = part.select(pl.col(columns).mean().name.suffix("_mean"))
            deviations = part.select(pl.col(columns).std(0).name.suffix("_scale"))
            statistics = means.to_dicts()[0] | deviations.to_dicts()[0]
    return counts, statistics


def with_ray_data(source: str) -> dict[str, Any]:
    """The usual way with Ray Data: `read_csv`, `map_batches`, `random_shuffle`, `StandardScaler`, three writes.

    It leaves duplicates in: to find them would cost another shuffle.
    """
    import polars as pl
    import pyarrow as pa
    import pyarrow.csv
    import ray.data
    from ray.data.preprocessors import StandardScaler

    types, rules = _rules()

    def validate(batch: pa.Table) -> pa.Table:
        frame = pl.from_arrow(batch)
        assert isinstance(frame, pl.DataFrame)
        frame = frame.with_columns(pl.col(name).cast(dtype, strict=False) for name, dtype in types.items())
        return frame.filter(rules).to_arrow()

    figures: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="housing-bench-") as folder,
        warm_ray("ray.data", "polars"),
        stopwatch(figures),
    ):
        texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(types, pa.string()))
        rows = ray.data.read_csv(source, convert_options=texts).map_batches(validate, batch_format="pyarrow")
        shuffled = rows.random_shuffle(seed=1).materialize()
        shuffled.write_parquet(f"{folder}/store")
        train, validation, test = shuffled.split_proportionately([0.6, 0.2])
        scaler = StandardScaler([name for name in types if name != "PRICE"]).fit(train)  # pyright: ignore[reportCallIssue]  # its decorator hides them
        counts = {}
        for name, part in (("train", train), ("validation", validation), ("test", test)):
            scaler.transform(part).write_parquet(f"{folder}/{name}")
            counts[name] = part.count()
    return {"figures": figures, "result": _result(sum(counts.values()), counts["train"])}


def _rules() -> tuple[dict[str, Any], Any]:
    """The schema's types, and its rules as one expression of polars."""
    import polars as pl

    from housing_assets.schema import HOUSING_TABLE

    rules = []
    for column in HOUSING_TABLE.columns:
        value = pl.col(column.name)
        rules.append(value.is_not_null() & (value.is_not_nan() if column.dtype == "float64" else True))
        if column.constraint():
            rules.append(column.limits.permit(value))
    types = {"int64": pl.Int64(), "float64": pl.Float64()}
    schema = {column.name: types[column.dtype] for column in HOUSING_TABLE.columns}
    return schema, pl.all_horizontal(*rules).fill_null(False)


def _result(rows: float, train: float) -> dict[str, Any]:
    return {"rows": int(rows), "train_rows": int(train)}


def main(arguments: list[str] | None = None) -> None:
    """Compare both in turn."""
    options = parser(__doc__, rows=1_000_000)
    others = {"polars": with_polars, "ray_data": with_ray_data}
    options.add_argument("--against", choices=list(others), help="one alternative only (default: each)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        source = str(write_sample(Path(folder, "sales.csv"), rows=chosen.rows))
        for name, other in others.items():
            if chosen.against in (None, name):
                compare(
                    f"ingestion_against_{name}",
                    Side("steps validate_source, ingest_features, prepare_splits", steps, {"source": source}),
                    Side(name, other, {"source": source}),
                    pairs=chosen.pairs,
                    warm_ups=chosen.warm_ups,
                    # Ray Data's side keeps duplicates, of which generated sales have few.
                    agree={"rows": 0.0 if name == "polars" else 0.001, "train_rows": 0.02},
                    rows=chosen.rows,
                )


if __name__ == "__main__":
    main()
