"""Errors of all predictors on the test split, block by block, and what the evaluation says of them.

Output `report` is `evaluation.json`, in the form of SageMaker's model quality reports, and `predictions.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import polars as pl

from step_scripts.evaluation.error_sums import ErrorSums, Grouping, merged, standard_deviations
from step_scripts.model import TrainedModel, load_model
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepContext, StepOutcome, file_info
from step_scripts.runner.wording import rounded
from step_scripts.table.distributions import Moments, Sample
from step_scripts.table.hashes import hashes_of_ids, split_fraction
from step_scripts.table.spec import TableSpec

_BATCH_ROWS = 1 << 18
_BAND_ROWS = 50_000
_SALT = "evaluation sample"
# Correlations are known to about 1e-13 after accumulation; directions weaker than this are duplicates of others.
_SINGULAR = 1e-10
_ROUNDING = 1e-12
_PERCENTS = (1, 5, 25, 50, 75, 95, 99)
_OF_SLICES, _OF_RIVALS = ("rmse", "mae", "bias", "mape"), ("rmse", "mae")
_DEVIATION_METHOD = "delta method over the test rows; NaN where it does not apply"


@dataclass(frozen=True)
class LinearModel:
    """`intercept + features @ coefficients`, where a missing value is replaced by the feature's mean."""

    features: tuple[str, ...]
    coefficients: np.ndarray
    intercept: float
    means: np.ndarray

    def predict(self, frame: pl.DataFrame) -> np.ndarray:
        """Predictions, one a row."""
        return _centered(frame, self.features, self.means) @ self.coefficients + (
            self.intercept + self.means @ self.coefficients
        )


def _centered(frame: pl.DataFrame, features: Sequence[str], means: np.ndarray) -> np.ndarray:
    """The features less `means` as float64, shape (rows, features), with 0 for nulls and NaN."""
    values = frame.select(pl.col(features).cast(pl.Float64)).to_numpy() - means
    values[np.isnan(values)] = 0.0
    return values


def products(frame: pl.DataFrame, features: Sequence[str], target: str, means: np.ndarray) -> np.ndarray:
    """What least squares needs to know of rows: sums of the products of 1, each centred feature, and the target.

    Those of different rows add up: nothing cancels, since `means` are near those of the features. Rows without a target
    are left out.
    """
    frame = frame.cast({target: pl.Float64}).filter(pl.col(target).is_finite())
    values = np.column_stack([np.ones(frame.height), _centered(frame, features, means), frame[target].to_numpy()])
    return values.T @ values


def least_squares(sums: np.ndarray, features: Sequence[str], means: np.ndarray) -> LinearModel:
    """The linear model of least squared error, from the `products` of at least one row.

    Solved on standardized columns. Columns that are constant, or linear functions of others, make the system singular;
    then it is the solution with the smallest coefficients.
    """
    count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    co_moments = sums[1:, 1:] - count * np.outer(mean, mean)
    scale = np.sqrt(np.diag(co_moments)[:-1].clip(0))
    # What varies by no more than rounding is constant.
    used = np.flatnonzero(scale > _ROUNDING * np.sqrt(count) * np.abs(means + mean[:-1]))
    coefficients = np.zeros(len(features))
    if used.size:
        correlation = co_moments[np.ix_(used, used)] / np.outer(scale[used], scale[used])
        solution, *_ = np.linalg.lstsq(correlation, co_moments[used, -1] / scale[used], rcond=_SINGULAR)
        coefficients[used] = solution / scale[used]
    intercept = float(mean[-1] - (means + mean[:-1]) @ coefficients)
    return LinearModel(tuple(features), coefficients, intercept, means)


@dataclass(frozen=True)
class EvaluationPlan:
    """What every task has to know.

    `models` holds URIs by role (`model`, perhaps `champion`); `sampled` is the share of the rows whose predictions are
    returned.
    """

    table: TableSpec
    models: dict[str, str]
    linear: LinearModel
    target_mean: float
    slices: tuple[Grouping, ...]
    plotted_rows: int
    sampled: float


@dataclass
class RowErrors:
    """Errors on some rows of the test split.

    `sums` by predictor: `model`, `mean`, `linear`, perhaps `champion`. `groups`: for each slice, by group. `sample` and
    `plotted` hold actual and predicted values, shape (rows, 2).
    """

    sums: dict[str, ErrorSums]
    target: Moments
    groups: list[dict[int, ErrorSums]]
    sample: np.ndarray
    plotted: Sample
    rows_without_target: int = 0


def merge_errors(parts: Sequence[RowErrors]) -> RowErrors:
    """Of the rows of all parts, of which there is at least one."""
    first, *others = (part.plotted for part in parts)
    return RowErrors(
        sums=reduce(merged, [part.sums for part in parts]),
        target=reduce(Moments.merge, [part.target for part in parts]),
        groups=[reduce(merged, groups) for groups in zip(*(part.groups for part in parts), strict=True)],
        sample=np.concatenate([part.sample for part in parts]),
        plotted=first.merge(*others),
        rows_without_target=sum(part.rows_without_target for part in parts),
    )


@lru_cache(maxsize=4)
def _loaded(uri: str) -> TrainedModel:
    """A model, once a worker process: artifacts never change. One thread, since there is a task on every CPU."""
    return load_model(uri, threads=1)


def errors_of_rows(rows: pl.DataFrame, plan: EvaluationPlan) -> RowErrors:
    """Errors of all predictors on rows of the test split. Raises `StepError` if a slice has too many groups."""
    return merge_errors([_errors_of_batch(plan, batch) for batch in rows.iter_slices(_BATCH_ROWS)])


def _errors_of_batch(plan: EvaluationPlan, batch: pl.DataFrame) -> RowErrors:
    frame = batch.with_columns(pl.col(plan.table.target).cast(pl.Float64))
    frame = frame.filter(pl.col(plan.table.target).is_finite())
    actual = frame[plan.table.target].to_numpy()
    predictions = {name: _loaded(uri).predict(frame).astype(np.float64) for name, uri in plan.models.items()}
    predictions["mean"] = np.full(len(actual), plan.target_mean)
    predictions["linear"] = plan.linear.predict(frame)
    pairs = np.column_stack([actual, predictions["model"]])
    hashes = split_fraction(hashes_of_ids(frame["record_id"]), _SALT)
    return RowErrors(
        sums={name: ErrorSums.of(actual, predicted) for name, predicted in predictions.items()},
        target=Moments.of(actual[:, None]),
        groups=[
            item.sums(frame[item.column].cast(pl.Float64).to_numpy(), actual, predictions["model"])
            for item in plan.slices
        ],
        sample=pairs if plan.sampled >= 1 else pairs[hashes < plan.sampled],
        plotted=Sample(plan.plotted_rows, hashes, pairs).merge(),
        rows_without_target=batch.height - frame.height,
    )


def sample_of(frame: pl.DataFrame, columns: Sequence[str]) -> Sample:
    """A sample of the values of rows with `record_id` and `columns`, from which bands are made."""
    hashes = split_fraction(hashes_of_ids(frame["record_id"]), _SALT)
    return Sample(_BAND_ROWS, hashes, frame.select(pl.col(columns).cast(pl.Float64)).to_numpy()).merge()


def evaluation_outcome(
    context: StepContext, plan: EvaluationPlan, errors: RowErrors, champion_remark: str
) -> StepOutcome:
    """Write output `report`. `champion_remark`: why there is no champion to compare with."""
    sums = errors.sums["model"]
    figures = _figures(errors)
    deviations = standard_deviations(errors.sample[:, 0], errors.sample[:, 1], sums.rows)
    quantiles = np.quantile(errors.sample[:, 0] - errors.sample[:, 1], [p / 100 for p in _PERCENTS]).tolist()
    slices = [
        {"slice": grouping.name, "group": grouping.label(key), "rows": group.rows, **_chosen(group, _OF_SLICES)}
        for grouping, groups in zip(plan.slices, errors.groups, strict=True)
        for key, group in sorted(groups.items())
    ]
    order = np.argsort(errors.plotted.hashes, kind="stable")
    actual, predicted = errors.plotted.values[order].T.tolist()
    predictions = {"actual": actual, "predicted": predicted}
    report = {
        "regression_metrics": {
            name: {"value": _json(value), "standard_deviation": _json(deviations.get(name, math.nan))}
            for name, value in figures.items()
        },
        "standard_deviation_method": _DEVIATION_METHOD,
        "baselines": {
            "mean": {**_chosen(errors.sums["mean"], _OF_RIVALS), "value": plan.target_mean},
            "linear": {
                **_chosen(errors.sums["linear"], _OF_RIVALS),
                "intercept": plan.linear.intercept,
                "coefficients": dict(zip(plan.linear.features, plan.linear.coefficients.tolist(), strict=True)),
            },
        },
        "champion": (
            _chosen(errors.sums["champion"], _OF_RIVALS) | {"model_digest": context.inputs["champion"].digest}
            if "champion" in errors.sums
            else {"remark": champion_remark}
        ),
        "slices": slices,
        "residual_quantiles": {f"{percent}%": value for percent, value in zip(_PERCENTS, quantiles, strict=True)},
        "rows": sums.rows,
        "rows_with_target_zero": sums.rows - sums.percentage_rows,
        "rows_without_target": errors.rows_without_target,
        "rows_for_quantiles": len(errors.sample),
        "model_digest": context.inputs["model"].digest,
        "train_digest": context.inputs["train"].digest,
        "test_digest": context.inputs["test"].digest,
    }
    uri = context.output_uri("report")
    storage.write_json(storage.join(uri, "evaluation.json"), report)
    storage.write_json(storage.join(uri, "predictions.json"), predictions)
    files = [file_info(storage.join(uri, name), uri) for name in ("evaluation.json", "predictions.json")]
    rivals = {"baseline_mean_rmse": "mean", "baseline_linear_rmse": "linear", "champion_rmse": "champion"}
    return StepOutcome(
        outputs={"report": Artifact.of(uri, files)},
        metrics={
            **{name: value for name, value in figures.items() if math.isfinite(value)},
            "test_rows": float(sums.rows),
            "rows_with_target_zero": float(sums.rows - sums.percentage_rows),
            "rows_without_target": float(errors.rows_without_target),
            **{metric: errors.sums[name].rmse for metric, name in rivals.items() if name in errors.sums},
        },
        details={
            "comparison": [_shown(row) for row in _comparison(errors)],
            "slices": [_shown(row) for row in slices],
            "residual_quantiles": [
                _shown({"percent": percent, "residual": value})
                for percent, value in zip(_PERCENTS, quantiles, strict=True)
            ],
            "linear_coefficients": report["baselines"]["linear"]["coefficients"],
            "predictions": predictions,
        },
    )


def _figures(errors: RowErrors) -> dict[str, float]:
    """The metrics of the model; NaN where one is not defined."""
    sums, spread = errors.sums["model"], float(errors.target.squares[0])
    return {
        **sums.figures(),
        "r2": 1 - sums.squared / spread if spread > 0 else math.nan,
        "median_absolute_error": float(np.median(np.abs(errors.sample[:, 0] - errors.sample[:, 1]))),
    }


def _chosen(sums: ErrorSums, names: tuple[str, ...]) -> dict[str, float | None]:
    figures = sums.figures()
    return {name: None if math.isnan(figures[name]) else figures[name] for name in names}


def _comparison(errors: RowErrors) -> list[dict[str, Any]]:
    """One row a predictor, with its RMSE relative to that of the model."""
    own = errors.sums["model"].rmse
    names = {"model": "this model", "champion": "champion", "linear": "linear model", "mean": "mean of train"}
    return [
        {
            "predictor": text,
            **_chosen(errors.sums[name], _OF_RIVALS),
            "times_rmse_of_model": errors.sums[name].rmse / own if own else None,
        }
        for name, text in names.items()
        if name in errors.sums
    ]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table for people: six significant digits, `n/a` for what is not defined."""
    return {
        name: "n/a" if value is None else rounded(value) if isinstance(value, float) else value
        for name, value in row.items()
    }


def _json(value: float) -> float | str:
    """JSON has no NaN: SageMaker's reports write it as text."""
    return value if math.isfinite(value) else "NaN"
