"""What an evaluation says: `evaluation.json` as SageMaker's model quality reports, metrics, and tables for people."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from step_scripts.evaluation.error_sums import ErrorSums, standard_deviations
from step_scripts.evaluation.errors_of_rows import EvaluationPlan, RowErrors
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepContext, StepOutcome, file_info
from step_scripts.runner.wording import rounded

_PERCENTS = (1, 5, 25, 50, 75, 95, 99)
_OF_SLICES, _OF_RIVALS = ("rmse", "mae", "bias", "mape"), ("rmse", "mae")
_DEVIATION_METHOD = "delta method over the test rows; NaN where it does not apply"


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
