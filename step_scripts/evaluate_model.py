"""Step `evaluate_model`: errors of a model on the test split, beside those of simple baselines and of a champion.

Output `report`: `evaluation.json` in the form of SageMaker's model quality reports (`regression_metrics.rmse.value` and
so on), and `predictions.json` with a sample of actual and predicted values for plots. Splits are read by Ray Data,
block by block; what is kept in memory are sums, and at most about five million pairs of values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce

import numpy as np

from step_scripts.evaluation.baselines import co_moments, least_squares
from step_scripts.evaluation.error_slices import Grouping, groupings, merge_samples, sample_of
from step_scripts.evaluation.errors_of_rows import EvaluationPlan, RowErrors, errors_of_rows, merge_errors
from step_scripts.evaluation.report import evaluation_outcome
from step_scripts.model.artifact import TrainedModel, load_model
from step_scripts.parameters import EvaluateModelParams, check_slices
from step_scripts.runner import storage
from step_scripts.runner.contract import (
    Artifact,
    StepContext,
    StepDefinition,
    StepError,
    StepOutcome,
)
from step_scripts.runner.ray_data import ParquetBlocks, Progress, parquet_blocks
from step_scripts.table.moments import CoMoments

MOST_EXACT_ROWS = 5_000_000
_SAMPLE_SALT = "evaluation sample"


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
        return evaluation_outcome(context, plan, errors, champion_remark)


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


STEP = StepDefinition(
    params=EvaluateModelParams,
    run=run,
    inputs=("model", "train", "test"),
    optional_inputs=("statistics", "champion"),
    outputs=("report",),
)
