"""Checks of the evaluation: the quality gate, which blocks, and two advisory checks."""

import dagster as dg

from housing_assets.checks.advisory import advisory_check
from housing_assets.checks.blocking import blocking_check
from housing_assets.checks.gate import judged_report
from resources.references.types import EvaluationRef
from step_scripts.runner.wording import number


@blocking_check(asset="evaluation_report", judged=lambda given, _: judged_report(given["evaluation_report"]))
def rmse_threshold(evaluation_report: EvaluationRef) -> dg.AssetCheckResult:
    """The quality gate: RMSE on the test split is at most the threshold; otherwise nothing is registered."""
    rmse, threshold = evaluation_report.metrics["rmse"], evaluation_report.rmse_threshold
    passed = rmse <= threshold  # also false for NaN
    return dg.AssetCheckResult(
        passed=passed,
        description=f"RMSE {number(rmse)}, threshold {number(threshold)}",
        metadata={
            "rmse": rmse,
            "threshold": threshold,
            "model_digest": evaluation_report.model_digest,
            "evaluation_digest": evaluation_report.report.digest,
        },
    )


_AGAIN = "materialize evaluation_report again"


@advisory_check(asset="evaluation_report", remedy=_AGAIN)
def beats_linear_baseline(evaluation_report: EvaluationRef) -> dg.AssetCheckResult:
    """The model is better than ordinary least squares on the same splits."""
    return _at_most(evaluation_report, evaluation_report.metrics["baseline_linear_rmse"], "a linear model")


@advisory_check(asset="evaluation_report", remedy=_AGAIN)
def beats_champion(evaluation_report: EvaluationRef) -> dg.AssetCheckResult:
    """The model is at least as good as the latest approved one, both on the current test split."""
    champion = evaluation_report.metrics.get("champion_rmse")
    if champion is None:
        return dg.AssetCheckResult(passed=True, description="there is no champion that it could be compared with")
    return _at_most(evaluation_report, champion, "the champion")


def _at_most(evaluation: EvaluationRef, other: float, opponent: str) -> dg.AssetCheckResult:
    rmse = evaluation.metrics["rmse"]
    return dg.AssetCheckResult(
        passed=rmse <= other,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"RMSE {number(rmse)}, that of {opponent} {number(other)}",
        metadata={"rmse": rmse, "threshold": other, "ratio": rmse / other if other else float("inf")},
    )
