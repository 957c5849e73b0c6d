"""Step `evaluate_model`: errors of a model on the test split, beside those of simple baselines and of a champion.

Output `report`: `evaluation.json` in the form of SageMaker's model quality reports (`regression_metrics.rmse.value` and
so on), and `predictions.json` with a sample of actual and predicted values for plots. Splits are read by Ray Data,
block by block; what is kept in memory are sums, and at most about five million pairs of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from step_scripts.evaluation.error_sums import Grouping, groupings
from step_scripts.evaluation.report import (
    EvaluationPlan,
    errors_of_rows,
    evaluation_outcome,
    least_squares,
    merge_errors,
    products,
    sample_of,
)
from step_scripts.model import TrainedModel, load_model
from step_scripts.parameters import EvaluateModelParams, check_slices
from step_scripts.runner.contract import StepContext, StepDefinition, StepError, StepOutcome
from step_scripts.runner.ray_data import ParquetBlocks, Progress, parquet_blocks
from step_scripts.table.spec import TableSpec

MOST_EXACT_ROWS = 5_000_000


def run(context: StepContext, params: EvaluateModelParams) -> StepOutcome:
    """Evaluate the model.

    Raises `StepError` if model or splits do not belong to the table, a split is empty, or a slice cannot be made.
    """
    table = params.table
    check_slices(params.slices, table)
    with context.phase("load"):
        model = context.inputs["model"]
        loaded = load_model(model.uri)
        if unknown := _unservable(loaded, table):
            raise StepError(
                f"the model at {model.uri} does not fit the table: {unknown}. Train it again on these splits"
            )
        champion_uri, champion_remark = _champion(context, table)
        fitted = loaded.scaler.to_json()["mean"]
        means = np.array([fitted.get(name, 0.0) for name in table.features], dtype=np.float64)
        train, test = (_blocks(context, name, ["record_id", *table.column_names]) for name in ("train", "test"))
    with context.phase("fit linear baseline"):
        progress = Progress(context.log, "evaluate_model, linear baseline", train.rows)
        sums = np.sum(train.reports(products, table.features, table.target, means, progress=progress), axis=0)
        if not sums[0, 0]:
            raise StepError(f"no row of the train split has a value of {table.target}; make the splits again")
    with context.phase("form slices"):
        slices = _groupings(context, params)
    plan = EvaluationPlan(
        table=table,
        models={"model": model.uri} | ({"champion": champion_uri} if champion_uri else {}),
        linear=least_squares(sums, table.features, means),
        target_mean=float(sums[0, -1] / sums[0, 0]),
        slices=slices,
        plotted_rows=params.plotted_rows,
        sampled=min(1.0, MOST_EXACT_ROWS / max(1, test.rows)),
    )
    with context.phase("evaluate"):
        progress = Progress(context.log, "evaluate_model", test.rows)
        errors = merge_errors(test.reports(errors_of_rows, plan, progress=progress))
        if not errors.sums["model"].rows:
            raise StepError(f"no row of the test split has a value of {table.target}; make the splits again")
        for grouping, groups in zip(slices, errors.groups, strict=True):
            grouping.require_few(len(groups))
    with context.phase("report"):
        return evaluation_outcome(context, plan, errors, champion_remark)


def _unservable(model: TrainedModel, table: TableSpec) -> str:
    """Why the test split cannot be predicted by `model`; empty if it can."""
    if model.table.target != table.target:
        return f"it predicts {model.table.target}, the table's target is {table.target}"
    lacking = sorted(set(model.table.features) - set(table.features))
    return f"it needs the features {lacking}, which the table {table.name} lacks" if lacking else ""


def _champion(context: StepContext, table: TableSpec) -> tuple[str | None, str]:
    """URI of the champion if it can be compared, else why not."""
    artifact = context.inputs.get("champion")
    if artifact is None:
        return None, "there is none"
    if reason := _unservable(load_model(artifact.uri), table):
        context.log.warning(f"the champion at {artifact.uri} cannot be compared: {reason}")
        return None, f"cannot be compared: {reason}"
    return artifact.uri, ""


def _blocks(context: StepContext, name: str, columns: Sequence[str]) -> ParquetBlocks:
    artifact = context.inputs[name]
    blocks = parquet_blocks(artifact, columns)
    if not blocks.rows:
        raise StepError(f"the {name} split at {artifact.uri} holds no rows; make the splits again")
    return blocks


def _groupings(context: StepContext, params: EvaluateModelParams) -> tuple[Grouping, ...]:
    columns = list(dict.fromkeys(item.column for item in params.slices if item.bands is not None))
    samples: dict[str, np.ndarray] = {}
    if columns:
        first, *others = _blocks(context, "test", ["record_id", *columns]).reports(sample_of, columns)
        samples = dict(zip(columns, first.merge(*others).values.T, strict=True))
    return groupings(params.slices, params.table, samples)


STEP = StepDefinition(
    params=EvaluateModelParams,
    run=run,
    inputs=("model", "train", "test"),
    outputs=("report",),
)
