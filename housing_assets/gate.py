"""The quality gate, enforced where it cannot be walked around.

A failed blocking check stops only the run that it is in. Whatever stands behind the gate therefore looks the check's
latest evaluation up itself, and refuses unless it passed for exactly the model at hand.
"""

from __future__ import annotations

import dagster as dg

from resources.model_registry.base import GateEvidence
from resources.references import EvaluationRef, ModelRef

EVALUATION = dg.AssetKey("evaluation_report")
GATE_CHECK = "rmse_threshold"


def require_gate_passed(context: dg.AssetExecutionContext, model: ModelRef, evaluation: EvaluationRef) -> GateEvidence:
    """Evidence that `model` passed the gate.

    Raises `dagster.Failure` if `evaluation` is of another model, if its check has not run since it was made, or failed.
    """
    if evaluation.model_digest != model.model.digest:
        raise refusal(
            f"the evaluation is of model {evaluation.model_digest[:12]}, not of model {model.model.digest[:12]}",
            "materialize evaluation_report again",
        )
    found = latest_gate_evaluation(context.instance)
    if found is None:
        raise refusal(f"check {GATE_CHECK} never ran on evaluation_report", "materialize evaluation_report")
    check, run_id = found
    made = context.instance.get_latest_materialization_event(EVALUATION)
    target = check.target_materialization_data
    if made is None or target is None or target.storage_id != _storage_id(context.instance):
        raise refusal(
            f"check {GATE_CHECK} has not run since evaluation_report was last materialized",
            "materialize evaluation_report with its checks",
        )
    if _text(check, "evaluation_digest") != evaluation.report.digest:
        raise refusal("the latest gate check is of another evaluation", "materialize evaluation_report again")
    rmse = evaluation.metrics["rmse"]
    if not check.passed:
        raise refusal(
            f"model {model.model.digest[:12]} has RMSE {rmse:,.1f}, the threshold is {evaluation.rmse_threshold:,.1f}",
            "improve the model, or materialize evaluation_report with another rmse_threshold",
        )
    return GateEvidence(
        passed=True,
        metric="rmse",
        value=rmse,
        threshold=evaluation.rmse_threshold,
        evaluation_digest=evaluation.report.digest,
        run_id=run_id,
    )


def latest_gate_evaluation(instance: dg.DagsterInstance) -> tuple[dg.AssetCheckEvaluation, str] | None:
    """The latest finished evaluation of the gate's check, with its run's id; `None` if it never ran."""
    record = instance.event_log_storage.get_latest_asset_check_execution_by_key(
        [dg.AssetCheckKey(EVALUATION, GATE_CHECK)]
    ).get(dg.AssetCheckKey(EVALUATION, GATE_CHECK))
    if record is None or record.event is None or record.event.dagster_event is None:
        return None
    return record.event.dagster_event.asset_check_evaluation_data, record.run_id


def require_not_failed_since(instance: dg.DagsterInstance, model_digest: str) -> None:
    """Raise `dagster.Failure` if the latest gate evaluation is of this very model and failed."""
    found = latest_gate_evaluation(instance)
    if found is not None and not found[0].passed and _text(found[0], "model_digest") == model_digest:
        raise refusal(
            f"the latest evaluation of model {model_digest[:12]} failed check {GATE_CHECK}",
            "improve the model, or evaluate it again with another threshold",
        )


def refusal(reason: str, remedy: str) -> dg.Failure:
    """The failure that everything behind the gate raises."""
    return dg.Failure(f"refused by the quality gate: {reason}. Remedy: {remedy}.", allow_retries=False)


def _storage_id(instance: dg.DagsterInstance) -> int | None:
    records = instance.fetch_materializations(EVALUATION, limit=1).records
    return records[0].storage_id if records else None


def _text(check: dg.AssetCheckEvaluation, name: str) -> str | None:
    value = check.metadata.get(name)
    return str(value.value) if value is not None else None
