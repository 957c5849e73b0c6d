"""Step `evaluate_model`: errors of a model on the test split, beside those of simple baselines and of a champion.

Output `report`: `evaluation.json` in the form of SageMaker's model quality reports (`regression_metrics.rmse.value` and
so on), and `predictions.json` with a sample of actual and predicted values for plots. Splits are read by Ray Data,
block by block; what is kept in memory are sums, and at most about five million pairs of values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from step_scripts.evaluation.baselines import co_moments, least_squares
from step_scripts.evaluation.error_slices import Grouping, groupings, merge_samples, sample_of
from step_scripts.evaluation.error_sums import ErrorSums, standard_deviations
from step_scripts.evaluation.errors_of_rows import EvaluationPlan, RowErrors, errors_of_rows, merge_errors
from step_scripts.model.artifact import TrainedModel, load_model
from step_scripts.parameters import EvaluateModelParams, check_slices
from step_scripts.runner import storage
from step_scripts.runner.contract import (
    Artifact,
    StepContext,
    StepDefinition,
    StepError,
    StepOutcome,
    file_info,
    write_json,
)
from step_scripts.runner.ray_data import ParquetBlocks, Progress, parquet_blocks
from step_scripts.runner.wording import rounded
from step_scripts.table.moments import CoMoments

MOST_EXACT_ROWS = 5_000_000
_PERCENTS = (1, 5, 25, 50, 75, 95, 99)
_SAMPLE_SALT = "evaluation sample"
_DEVIATION_METHOD = "delta method over the test rows; NaN where it does not apply"


def run(context: StepContext, params: EvaluateModelParams) -> StepOutcome:
    """Evaluate the model.

    Raises `StepError` if model or splits do not belong to the table, a split is empty, or a slice cannot be made.
    """
    table = params.table
    check_slices(params.slices, table)
    with context.phase("load"):
        model = _model(context.inputs["model"], params)
        champion_uri, champion_remark = _champion(context, params)
        means = _means(context, params, model)
        train, test = (_blocks(context, name, ["record_id", *table.column_names]) for name in ("train", "test"))
    with context.phase("fit linear baseline"):
        moments = _train_moments(context, params, train, means)
        linear = least_squares(moments, table.features)
    with context.phase("form slices"):
        slices = _groupings(context, params)
    plan = EvaluationPlan(
        table=table,
        models={"model": context.inputs["model"].uri} | ({"champion": champion_uri} if champion_uri else {}),
        linear=linear,
        means=means,
        target_mean=float(moments.mean[-1]),
        slices=tuple(slices),
        plotted_rows=params.plotted_rows,
        sampled=min(1.0, MOST_EXACT_ROWS / max(1, test.rows)),
        salt=_SAMPLE_SALT,
    )
    with context.phase("evaluate"):
        errors = _test_errors(context, plan, test)
    with context.phase("report"):
        return _outcome(context, plan, errors, champion_remark)


def _model(artifact: Artifact, params: EvaluateModelParams) -> TrainedModel:
    model = load_model(artifact.uri)
    if unknown := _unservable(model, params):
        raise StepError(
            f"the model at {artifact.uri} does not fit the table: {unknown}. Train it again on these splits"
        )
    return model


def _unservable(model: TrainedModel, params: EvaluateModelParams) -> str:
    """Why the test split cannot be predicted by `model`; empty if it can."""
    table = params.table
    if model.table.target != table.target:
        return f"it predicts {model.table.target}, the table's target is {table.target}"
    lacking = sorted(set(model.table.features) - set(table.features))
    return f"it needs the features {lacking}, which the table {table.name} lacks" if lacking else ""


def _champion(context: StepContext, params: EvaluateModelParams) -> tuple[str | None, str]:
    """URI of the champion if it can be compared, else why not."""
    artifact = context.inputs.get("champion")
    if artifact is None:
        return None, "there is none"
    if reason := _unservable(load_model(artifact.uri), params):
        context.log.warning(f"the champion at {artifact.uri} cannot be compared: {reason}")
        return None, f"cannot be compared: {reason}"
    return artifact.uri, ""


def _means(context: StepContext, params: EvaluateModelParams, model: TrainedModel) -> np.ndarray:
    """Means of the features in the training split; they replace nulls in the linear baseline."""
    means = model.scaler.to_json()["mean"]
    if (statistics := context.inputs.get("statistics")) is not None:
        means = json.loads(storage.read_bytes(statistics.file_uri("scaler.json")))["mean"]
    return np.array([means.get(name, 0.0) for name in params.table.features], dtype=np.float64)


def _blocks(context: StepContext, name: str, columns: Sequence[str]) -> ParquetBlocks:
    artifact = context.inputs[name]
    blocks = parquet_blocks(artifact, columns)
    if not blocks.rows:
        raise StepError(f"the {name} split at {artifact.uri} holds no rows; make the splits again")
    return blocks


def _train_moments(
    context: StepContext, params: EvaluateModelParams, train: ParquetBlocks, means: np.ndarray
) -> CoMoments:
    features, target = params.table.features, params.table.target
    progress = Progress(context.log, "evaluate_model, linear baseline", train.rows)
    merged = reduce(CoMoments.merge, train.reports(co_moments, features, target, means, progress=progress))
    if not merged.count:
        raise StepError(f"no row of the train split has a value of {target}; make the splits again")
    return merged


def _groupings(context: StepContext, params: EvaluateModelParams) -> list[Grouping]:
    columns = list(dict.fromkeys(item.column for item in params.slices if item.bands is not None))
    samples: dict[str, np.ndarray] = {}
    if columns:
        banded = _blocks(context, "test", ["record_id", *columns])
        sample = reduce(merge_samples, banded.reports(sample_of, columns, _SAMPLE_SALT))
        samples = dict(zip(columns, sample.values.T, strict=True))
    return groupings(params.slices, params.table, samples)


def _test_errors(context: StepContext, plan: EvaluationPlan, test: ParquetBlocks) -> RowErrors:
    progress = Progress(context.log, "evaluate_model", test.rows)
    merged = merge_errors(test.reports(errors_of_rows, plan, progress=progress), plan.plotted_rows)
    if not merged.sums["model"].rows:
        raise StepError(f"no row of the test split has a value of {plan.table.target}; make the splits again")
    return merged


def _outcome(context: StepContext, plan: EvaluationPlan, errors: RowErrors, champion_remark: str) -> StepOutcome:
    sums = errors.sums["model"]
    figures = _figures(errors)
    deviations = standard_deviations(errors.sample[:, 0], errors.sample[:, 1], sums.rows)
    quantiles = np.quantile(errors.sample[:, 0] - errors.sample[:, 1], [p / 100 for p in _PERCENTS]).tolist()
    slices = [
        {"slice": grouping.name, "group": grouping.label(key), **_slice_figures(groups[key])}
        for grouping, groups in zip(plan.slices, errors.groups, strict=True)
        for key in sorted(groups)
    ]
    order = np.argsort(errors.hashes, kind="stable")
    actual, predicted = errors.plotted[order].T.tolist()
    predictions = {"actual": actual, "predicted": predicted}
    report = {
        "regression_metrics": {
            name: {"value": _json(value), "standard_deviation": _json(deviations.get(name, math.nan))}
            for name, value in figures.items()
        },
        "standard_deviation_method": _DEVIATION_METHOD,
        "baselines": {
            "mean": {**_predictor_figures(errors.sums["mean"]), "value": plan.target_mean},
            "linear": {
                **_predictor_figures(errors.sums["linear"]),
                "intercept": plan.linear.intercept,
                "coefficients": dict(zip(plan.linear.features, plan.linear.coefficients.tolist(), strict=True)),
            },
        },
        "champion": (
            _predictor_figures(errors.sums["champion"]) | {"model_digest": context.inputs["champion"].digest}
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
    write_json(storage.join(uri, "evaluation.json"), report)
    write_json(storage.join(uri, "predictions.json"), predictions)
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
    sums = errors.sums["model"]
    spread = float(errors.target.squares[0])
    absolute = np.abs(errors.sample[:, 0] - errors.sample[:, 1])
    return {
        "rmse": sums.rmse,
        "mse": sums.mse,
        "mae": sums.mae,
        "r2": 1 - sums.squared / spread if spread > 0 else math.nan,
        "mape": sums.mape,
        "median_absolute_error": float(np.median(absolute)),
        "max_error": sums.largest,
        "bias": sums.bias,
    }


def _predictor_figures(sums: ErrorSums) -> dict[str, Any]:
    return {"rmse": sums.rmse, "mae": sums.mae}


def _slice_figures(sums: ErrorSums) -> dict[str, Any]:
    figures = {"rmse": sums.rmse, "mae": sums.mae, "bias": sums.bias, "mape": sums.mape}
    return {"rows": sums.rows, **{name: None if math.isnan(value) else value for name, value in figures.items()}}


def _comparison(errors: RowErrors) -> list[dict[str, Any]]:
    """One row a predictor, with its RMSE relative to that of the model."""
    own = errors.sums["model"].rmse
    names = {"model": "this model", "champion": "champion", "linear": "linear model", "mean": "mean of train"}
    return [
        {
            "predictor": text,
            **_predictor_figures(errors.sums[name]),
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


STEP = StepDefinition(
    params=EvaluateModelParams,
    run=run,
    inputs=("model", "train", "test"),
    optional_inputs=("statistics", "champion"),
    outputs=("report",),
)
