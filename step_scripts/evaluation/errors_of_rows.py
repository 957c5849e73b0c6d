"""Predictions for a block of the test split, reduced to sums and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import polars as pl

from step_scripts.evaluation.baselines import LinearModel, filled_matrix
from step_scripts.evaluation.error_slices import MOST_GROUPS, Grouping, merge_groups, too_many_groups
from step_scripts.evaluation.error_sums import ErrorSums
from step_scripts.model.artifact import TrainedModel, load_model
from step_scripts.table.distributions import smallest
from step_scripts.table.moments import Moments
from step_scripts.table.record_ids import split_fraction
from step_scripts.table.spec import TableSpec

_BATCH_ROWS = 1 << 18


@dataclass(frozen=True)
class EvaluationPlan:
    """What every task has to know.

    `models` holds URIs by role (`model`, perhaps `champion`); `means` those of the features, for the linear baseline;
    `sampled` is the share of the rows whose predictions are returned, `salt` decides which.
    """

    table: TableSpec
    models: dict[str, str]
    linear: LinearModel
    means: np.ndarray
    target_mean: float
    slices: tuple[Grouping, ...]
    plotted_rows: int
    sampled: float
    salt: str


@dataclass
class RowErrors:
    """Errors on some rows of the test split.

    `sums` by predictor: `model`, `mean`, `linear`, perhaps `champion`. `groups`: for each slice, by group. `sample` and
    `plotted` hold actual and predicted values, shape (rows, 2); `hashes` those of the plotted rows.
    """

    sums: dict[str, ErrorSums]
    target: Moments
    groups: list[dict[int, ErrorSums]]
    sample: np.ndarray
    plotted: np.ndarray
    hashes: np.ndarray
    rows_without_target: int = 0


def merge_errors(parts: Sequence[RowErrors], plotted_rows: int) -> RowErrors:
    """Of the rows of all parts, of which there is at least one; of the plotted rows, `plotted_rows` are kept."""
    first = parts[0]
    hashes = np.concatenate([part.hashes for part in parts])
    kept = smallest(hashes, plotted_rows)
    return RowErrors(
        sums={name: reduce(ErrorSums.merge, [part.sums[name] for part in parts]) for name in first.sums},
        target=reduce(Moments.merge, [part.target for part in parts]),
        groups=[reduce(merge_groups, groups) for groups in zip(*(part.groups for part in parts), strict=True)],
        sample=np.concatenate([part.sample for part in parts]),
        plotted=np.concatenate([part.plotted for part in parts])[kept],
        hashes=hashes[kept],
        rows_without_target=sum(part.rows_without_target for part in parts),
    )


@lru_cache(maxsize=4)
def _loaded(uri: str) -> TrainedModel:
    """A model, once a worker process: artifacts never change. One thread, since there is a task on every CPU."""
    return load_model(uri, threads=1)


def errors_of_rows(rows: pl.DataFrame, plan: EvaluationPlan) -> RowErrors:
    """Errors of all predictors on rows of the test split. Raises `StepError` if a slice has too many groups."""
    batches = rows.iter_slices(_BATCH_ROWS)
    merged = merge_errors([_errors_of_batch(plan, batch) for batch in batches], plan.plotted_rows)
    for grouping, groups in zip(plan.slices, merged.groups, strict=True):
        if len(groups) > MOST_GROUPS:
            raise too_many_groups(grouping)
    return merged


def _errors_of_batch(plan: EvaluationPlan, batch: pl.DataFrame) -> RowErrors:
    frame = batch.with_columns(pl.col(plan.table.target).cast(pl.Float64))
    frame = frame.filter(pl.col(plan.table.target).is_finite())
    actual = frame[plan.table.target].to_numpy()
    predictions = {name: _loaded(uri).predict(frame).astype(np.float64) for name, uri in plan.models.items()}
    predictions["mean"] = np.full(len(actual), plan.target_mean)
    predictions["linear"] = plan.linear.predict(filled_matrix(frame, plan.table.features, plan.means))
    pairs = np.column_stack([actual, predictions["model"]])
    hashes = split_fraction(frame["record_id"], plan.salt)
    plotted = smallest(hashes, plan.plotted_rows)
    return RowErrors(
        sums={name: ErrorSums.of(actual, predicted) for name, predicted in predictions.items()},
        target=Moments.of(actual[:, None]),
        groups=[
            item.sums(frame[item.column].cast(pl.Float64).to_numpy(), actual, predictions["model"])
            for item in plan.slices
        ],
        sample=pairs if plan.sampled >= 1 else pairs[hashes < plan.sampled],
        plotted=pairs[plotted],
        hashes=hashes[plotted],
        rows_without_target=batch.height - frame.height,
    )
