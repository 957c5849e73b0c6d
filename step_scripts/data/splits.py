"""Divides the records of a block among the splits, and says what the splits hold.

Of several events of a record the latest one counts, unless it is a deletion. Rows stay where they are: what meets,
in partitions by hash (`step_scripts.table.hashes`), are ids, times and positions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from step_scripts.data.row_files import write_parquet
from step_scripts.parameters import PrepareSplitsParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, Reporter, StepContext, StepError, StepOutcome, file_info
from step_scripts.runner.ray_data import PATH, ParquetBlocks, Progress, each_call
from step_scripts.runner.wording import counted, rounded
from step_scripts.table.column_types import TIMESTAMP, columns_as, polars_schema
from step_scripts.table.distributions import MOST_VALUES, Moments, TableSketch, quantile
from step_scripts.table.hashes import (
    RowSetDigest,
    distinct_hashes,
    hashes_of_ids,
    partition_of,
    read_partition,
    split_fraction,
    write_partitions,
)

SPLITS = ("train", "validation", "test")
_COUNTS = ("rows_read", "rows_later", "rows_superseded", "rows_deleted")
# In order of precedence: the latest event wins; of equal ones, the one that was written last.
TIMES = ("event_time", "api_invocation_time", "write_time")
_PARTITION_ROWS = 2_000_000
_ID = ["hash_hi", "hash_lo"]


class LatestEvents(NamedTuple):
    """Where the positions of the events are that count, and how many there were, by what became of them."""

    uri: str
    counts: dict[str, int]

    def of(self, rows: pl.DataFrame, place: int) -> pl.DataFrame:
        """The rows that count of the block whose first file has that place."""
        kept = np.zeros(rows.height, dtype=bool)
        for found in read_partition(storage.list_files(storage.join(self.uri, "kept")), place):
            kept[found["row"].to_numpy()] = True
        return rows.filter(pl.Series(kept))


def latest_events(blocks: ParquetBlocks, as_of: datetime | None, scratch_uri: str, log: Reporter) -> LatestEvents:
    """Find them among `blocks`, with columns `record_id`, `is_deleted` and those of `TIMES` that there are.

    What is written goes below `scratch_uri`.
    """
    partitions = max(1, -(-blocks.rows // _PARTITION_ROWS))
    progress = Progress(log, "prepare_splits, bringing events of a record together", blocks.rows)
    later = blocks.reports(_scatter, blocks.files, as_of, scratch_uri, partitions, progress=progress)
    calls = [(number, len(blocks.files), scratch_uri) for number in range(partitions)]
    chosen = [counts for _, counts in each_call(_choose, calls)]
    counts = {
        "rows_read": blocks.rows,
        "rows_later": sum(later),
        "rows_superseded": sum(superseded for superseded, _ in chosen),
        "rows_deleted": sum(deleted for _, deleted in chosen),
    }
    return LatestEvents(scratch_uri, counts)


def _scatter(
    rows: pl.DataFrame, files: dict[str, int], as_of: datetime | None, scratch_uri: str, partitions: int
) -> int:
    """Write ids, times and positions of a block's events. Returns how many are later than `as_of`."""
    place = files[rows[PATH][0]]
    hashes = distinct_hashes(rows["record_id"], hashes_of_ids(rows["record_id"]))
    events = rows.select(
        *map(pl.Series, _ID, hashes),
        *columns_as(rows.schema, dict.fromkeys(TIMES, TIMESTAMP)),
        pl.col("is_deleted").fill_null(False),
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
        pl.lit(place, pl.UInt32).alias("place"),
    )
    if as_of is not None:
        events = events.filter(pl.col("event_time") <= as_of)
    number = partition_of(events["hash_hi"].to_numpy(), partitions)
    write_partitions(events, number, partitions, storage.join(scratch_uri, "events", f"{place:05d}.arrow"))
    return rows.height - events.height


def _choose(number: int, places: int, scratch_uri: str) -> tuple[int, int]:
    """Write the positions of a partition's rows that count. Returns how many are superseded, how many deletions."""
    # In the order of the blocks: of events with equal times the last one counts.
    frames = list(read_partition(storage.list_files(storage.join(scratch_uri, "events")), number))
    if not frames:
        return 0, 0
    events = pl.concat(frames)
    ordered = events.sort(*_ID, *TIMES, maintain_order=True, nulls_last=False)
    latest = ordered.unique(_ID, keep="last", maintain_order=True)
    live = latest.filter(~pl.col("is_deleted"))
    uri = storage.join(scratch_uri, "kept", f"{number:05d}.arrow")
    write_partitions(live.select("row"), live["place"].cast(pl.Int64).to_numpy(), places, uri)
    return events.height - latest.height, latest.height - live.height


@dataclass(frozen=True)
class SplitPlan:
    """What every task has to know.

    `uris` are the prefixes of the three outputs, `places` tells the order of the files that are read. `latest` says
    which rows count; without it, each record has one event.
    """

    params: PrepareSplitsParams
    uris: dict[str, str]
    files_per_block: int
    places: dict[str, int]
    latest: LatestEvents | None = None

    @property
    def statistics_columns(self) -> tuple[str, ...]:
        """Features, then the target."""
        return (*self.params.table.features, self.params.table.target)


@dataclass
class SplitReport:
    """What became of a block: files, statistics of the training rows; counts of rows, unless `latest` has them."""

    files: dict[str, list[FileInfo]]
    digests: dict[str, RowSetDigest]
    moments: Moments
    sketch: TableSketch
    counts: dict[str, int] = field(default_factory=dict)


def split_rows(rows: pl.DataFrame, plan: SplitPlan) -> SplitReport:
    """Divide the records of a block among the splits. Files are named by the place of the block's first file."""
    place = plan.places[rows[PATH][0]]
    # Files from before a nullable column was added to the table do not have it.
    types: dict[str, Any] = {**polars_schema(plan.params.table), "event_time": TIMESTAMP}
    frame = rows.with_columns(*columns_as(rows.schema, types), pl.col("is_deleted").fill_null(False))
    if plan.latest is not None:
        return _write(plan, place, plan.latest.of(frame, place))
    as_of = plan.params.as_of
    current = frame.filter(pl.col("event_time") <= as_of) if as_of is not None else frame
    live = current.filter(~pl.col("is_deleted")) if current["is_deleted"].any() else current
    report = _write(plan, place, live)
    later, deleted = frame.height - current.height, current.height - live.height
    report.counts = dict(zip(_COUNTS, (frame.height, later, 0, deleted), strict=True))
    return report


def _write(plan: SplitPlan, place: int, live: pl.DataFrame) -> SplitReport:
    params, names = plan.params, plan.params.table.column_names
    hashes = hashes_of_ids(live["record_id"])
    fractions = split_fraction(hashes, params.split_salt)
    distinct = distinct_hashes(live["record_id"], hashes)
    train, below = (fractions < limit for limit in (params.train_size, params.train_size + params.validation_size))
    rows = live.select("record_id", *names)
    files: dict[str, list[FileInfo]] = {}
    digests: dict[str, RowSetDigest] = {}
    for split, side in {"train": train, "validation": below & ~train, "test": ~below}.items():
        chosen = rows.filter(pl.Series(side))
        files[split] = _write_files(plan, plan.uris[split], place, chosen)
        digests[split] = RowSetDigest.of(distinct.compress(side, axis=1), chosen, names)
    columns = pl.col(plan.statistics_columns).cast(pl.Float64)
    values = rows.filter(pl.Series(train)).select(columns).to_numpy()
    return SplitReport(files, digests, Moments.of(values[:, :-1]), TableSketch.of(values, fractions[train]))


def _write_files(plan: SplitPlan, uri: str, place: int, rows: pl.DataFrame) -> list[FileInfo]:
    size = max(1, -(-rows.height // plan.files_per_block))
    return [
        write_parquet(frame, uri, f"part-{place * plan.files_per_block + number:05d}.parquet")
        for number, frame in enumerate(rows.iter_slices(size) if rows.height else ())
    ]


def split_outcome(
    context: StepContext, plan: SplitPlan, reports: list[SplitReport], sketch: TableSketch
) -> StepOutcome:
    """Write output `statistics`; what the splits hold. Raises `StepError` if one of them would be empty."""
    counted_rows = [plan.latest.counts] if plan.latest else [report.counts for report in reports]
    counts = {name: sum(found[name] for found in counted_rows) for name in _COUNTS}
    schema = ",".join(f"{column.name}:{column.dtype}" for column in plan.params.table.columns)
    splits: dict[str, Artifact] = {}
    for split in SPLITS:
        digest = reduce(RowSetDigest.merge, (report.digests[split] for report in reports), RowSetDigest())
        files = [file for report in reports for file in report.files[split]]
        splits[split] = Artifact.of(plan.uris[split], files, digest=digest.hexdigest(schema))
    rows = {split: splits[split].rows or 0 for split in SPLITS}
    total = sum(rows.values())
    if not all(rows.values()):
        raise StepError(_emptiness(plan.params, rows, counts), details={**rows, **counts})
    with context.phase("statistics"):
        scaler = _scaler(plan, reports, rows["train"])
        distributions = sketch.distributions(plan.statistics_columns)
        statistics = _write_statistics(context, plan, splits["train"], scaler, distributions)
    return StepOutcome(
        outputs={**splits, "statistics": statistics},
        metrics={
            **{f"{split}_rows": float(rows[split]) for split in SPLITS},
            **{f"{split}_fraction": rows[split] / total for split in SPLITS},
            **{name: float(count) for name, count in counts.items()},
        },
        details={
            "splits": [
                {
                    "split": split,
                    "rows": rows[split],
                    "fraction": rounded(rows[split] / total),
                    "configured": getattr(plan.params, f"{split}_size"),
                    "files": len(splits[split].files),
                }
                for split in SPLITS
            ],
            "columns": _summary(distributions, scaler),
            "scaler": scaler,
        },
    )


def _emptiness(params: PrepareSplitsParams, rows: dict[str, int], counts: dict[str, int]) -> str:
    """Why a split is empty, and what to do about it."""
    total = sum(rows.values())
    if not total:
        return (
            f"the feature store has no live records to split ({counted(counts['rows_read'], 'row')} read, "
            f"{counts['rows_deleted']:,} deleted, {counts['rows_superseded']:,} superseded, {counts['rows_later']:,} "
            f"later than {params.as_of or 'now'}): ingest rows first, or choose a later `as_of`"
        )
    empty = " and ".join(split for split in SPLITS if not rows[split])
    shares = ", ".join(f"{split} {rows[split]:,}" for split in SPLITS)
    return (
        f"no records for {empty}: of {counted(total, 'record')}, {shares}. Records go by a hash of their "
        "id, so that a few may all fall on one side: bring more rows, or give the empty split a larger fraction "
        "(train_size, validation_size, test_size)"
    )


def _scaler(plan: SplitPlan, reports: list[SplitReport], rows: int) -> dict[str, Any]:
    """Mean and population standard deviation of each feature in the training split."""
    features = plan.params.table.features
    moments = reduce(Moments.merge, (report.moments for report in reports))
    # A column without any value, or with one value only, is left as it is.
    mean = np.nan_to_num(moments.mean)
    scale = np.where(moments.deviation > 0, moments.deviation, 1.0)
    return {
        "mean": dict(zip(features, mean.tolist(), strict=True)),
        "scale": dict(zip(features, scale.tolist(), strict=True)),
        "rows": rows,
    }


def _write_statistics(
    context: StepContext, plan: SplitPlan, train: Artifact, scaler: dict[str, Any], distributions: dict[str, Any]
) -> Artifact:
    uri = context.output_uri("statistics")
    described = {"rows": scaler["rows"], "target": plan.params.table.target, "distributions": distributions}
    storage.write_json(storage.join(uri, "scaler.json"), scaler)
    storage.write_json(storage.join(uri, "statistics.json"), described)
    files = [file_info(storage.join(uri, name), uri) for name in ("scaler.json", "statistics.json")]
    # They follow from the training rows alone. The last binary digit of a mean also depends on how rows were divided
    # into files; it must not make the same data look changed.
    digest = hashlib.sha256(f"statistics\0{train.digest}\0{','.join(plan.statistics_columns)}".encode()).hexdigest()
    return Artifact.of(uri, files, digest=digest)


def _summary(distributions: dict[str, Any], scaler: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a column, for people."""
    mean, scale = scaler["mean"], scaler["scale"]
    return [
        {
            "column": name,
            "role": "feature" if name in mean else "target",
            "minimum": rounded(quantile(found, 0.0)),
            "median": rounded(quantile(found, 0.5)),
            "maximum": rounded(quantile(found, 1.0)),
            "missing": found["missing"],
            "distinct": str(len(found["values"])) if found["kind"] == "counts" else f"more than {MOST_VALUES}",
            "mean": rounded(mean[name]) if name in mean else "",
            "standard_deviation": rounded(scale[name]) if name in scale else "",
        }
        for name, found in distributions.items()
    ]
