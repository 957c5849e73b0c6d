"""The quality gate, enforced where it cannot be walked around.

A failed blocking check stops only the run that it is in. Whatever stands behind the gate therefore looks the check's
latest evaluation up itself, and refuses unless it passed for exactly the model at hand.
"""

from __future__ import annotations

import dagster as dg

from housing_assets.check_history import finished_checks
from resources.model_registry.base import GateEvidence
from resources.references import EvaluationRef, ModelRef

EVALUATION = dg.AssetKey("evaluation_report")
GATE_CHECK = "rmse_threshold"
_HISTORY = 1000


def require_gate_passed(context: dg.AssetExecutionContext, model: ModelRef, evaluation: EvaluationRef) -> GateEvidence:
    """Evidence that `model` passed the gate.

    Raises `dagster.Failure` if `evaluation` is of another model, if the check has not judged exactly this evaluation
    with exactly this threshold, or if it failed.
    """
    if evaluation.model_digest != model.model.digest:
        raise refusal(
            f"the evaluation is of model {evaluation.model_digest[:12]}, not of model {model.model.digest[:12]}",
            "materialize evaluation_report again",
        )
    # By content and not by "latest": another run may have planned or finished a check of its own in the meantime.
    found = _latest_check(
        context.instance,
        model_digest=model.model.digest,
        evaluation_digest=evaluation.report.digest,
        threshold=evaluation.rmse_threshold,
    )
    if found is None:
        raise refusal(
            f"check {GATE_CHECK} has not judged the evaluation of model {model.model.digest[:12]}",
            "materialize evaluation_report with its checks",
        )
    check, run_id = found
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


def require_not_failed_since(instance: dg.DagsterInstance, model_digest: str) -> None:
    """Raise `dagster.Failure` if the latest finished check of this very model failed."""
    found = _latest_check(instance, model_digest=model_digest)
    if found is not None and not found[0].passed:
        raise refusal(
            f"the latest evaluation of model {model_digest[:12]} failed check {GATE_CHECK}",
            "improve the model, or evaluate it again with another threshold",
        )


def _latest_check(instance: dg.DagsterInstance, **facts: str | float) -> tuple[dg.AssetCheckEvaluation, str] | None:
    """The latest finished evaluation of the check whose metadata holds `facts`, with its run's id."""
    for check, run_id in finished_checks(instance, dg.AssetCheckKey(EVALUATION, GATE_CHECK), limit=_HISTORY):
        if all(name in check.metadata and check.metadata[name].value == value for name, value in facts.items()):
            return check, run_id
    return None


def refusal(reason: str, remedy: str) -> dg.Failure:
    """The failure that everything behind the gate raises."""
    return dg.Failure(f"refused by the quality gate: {reason}. Remedy: {remedy}.", allow_retries=False)
