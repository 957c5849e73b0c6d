"""Approving and rejecting registered models: jobs for the UI and the command line."""

import dagster as dg
from pydantic import Field

from housing_assets.checks.gate import require_checks_passed
from resources.model_registry.base import (
    ApprovalStatus,
    GateNotPassed,
    ModelRegistry,
    ModelVersionNotFound,
)
from resources.references.evidence import EvidenceStore
from step_scripts.parameters import MODEL_GROUP


class DecisionConfig(dg.Config):
    """Which version is decided on, by whom, and why."""

    model_group: str | None = MODEL_GROUP
    version: int = Field(ge=1, description="Number of the version.")
    who: str = Field(min_length=1, description="Who decides; goes into the version's history.")
    why: str = Field(min_length=1, description="The reason; goes into the version's history.")


def _decide(
    context: dg.OpExecutionContext,
    config: DecisionConfig,
    registry: ModelRegistry,
    status: ApprovalStatus,
    evidence: EvidenceStore | None = None,
) -> None:
    try:
        group = config.model_group or registry.default_group
        if evidence is not None:
            require_checks_passed(context, evidence, "endpoint", registry.get(group, config.version))
        version = registry.set_status(group, config.version, status, who=config.who, why=config.why)
    except (ModelVersionNotFound, GateNotPassed, ValueError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    context.log.info(f"{version.reference} is {version.status}: {config.why} ({config.who})")
    history = [
        dg.TableRecord({"status": c.status, "who": c.who, "why": c.why, "when": c.when.isoformat()})
        for c in version.status_history
    ]
    context.log_event(
        dg.AssetObservation(
            asset_key="registered_model",
            metadata={
                "model_version": version.reference,
                "approval_status": version.status,
                "history": dg.MetadataValue.table(history),
            },
        )
    )


@dg.op
def approve(
    context: dg.OpExecutionContext, config: DecisionConfig, model_registry: ModelRegistry, evidence: EvidenceStore
) -> None:
    """Approve a version whose evaluation passed the gate, made from data that passed their checks."""
    _decide(context, config, model_registry, "Approved", evidence)


@dg.op
def reject(context: dg.OpExecutionContext, config: DecisionConfig, model_registry: ModelRegistry) -> None:
    """Reject a version: it will not be deployed."""
    _decide(context, config, model_registry, "Rejected")


@dg.job
def approve_model() -> None:
    """Approve a registered model, so that `endpoint` may serve it. Configuration: version, who, why."""
    approve()


@dg.job
def reject_model() -> None:
    """Reject a registered model. Configuration: version, who, why."""
    reject()
