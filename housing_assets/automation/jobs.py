"""Jobs that materialize a part of the graph or decide on model versions; when assets follow their inputs by themselves.

Conditions and freshness are applied to all assets at once, by `automated`.
"""

from collections.abc import Mapping
from datetime import timedelta

import dagster as dg
from pydantic import Field

from housing_assets.checks.gate import require_checks_passed
from housing_assets.config import MODEL_GROUP
from housing_assets.settings import Settings
from resources.compute.base import table
from resources.model_registry.base import ApprovalStatus, GateNotPassed, ModelRegistry, ModelVersionNotFound
from resources.references.evidence import EvidenceStore

_SETTINGS = Settings.load()
_INGESTION = dg.AssetSelection.assets("raw_csv", "feature_group")
_TRAINING = dg.AssetSelection.assets(
    "train_split", "validation_split", "test_split", "tuned_model", "evaluation_report", "registered_model"
)
_ENDPOINT = dg.AssetSelection.assets("endpoint")  # a text would be parsed, by a parser that takes 0.05 s to import

ingest = dg.define_asset_job(
    "ingest", selection=_INGESTION, description="Validate files and add their rows to the feature store."
)
retrain = dg.define_asset_job(
    "retrain",
    selection=_TRAINING,
    description="Splits, search, evaluation and registration, on what the feature store holds now.",
)
deploy_endpoint = dg.define_asset_job(
    "deploy_endpoint",
    selection=_ENDPOINT,
    description="Serve an approved version: the latest registered, or `version`.",
)
rollback_endpoint = dg.define_asset_job(
    "rollback_endpoint",
    selection=_ENDPOINT,
    config={"ops": {"endpoint": {"config": {"rollback": True}}}},
    description="Serve again what the endpoint served before. It is tested like every other version.",
)

weekly_retraining = dg.ScheduleDefinition(
    name="weekly_retraining",
    job=retrain,
    cron_schedule=_SETTINGS.retrain_cron,
    execution_timezone=_SETTINGS.timezone,
    description="Retrains on what the feature store holds (HOUSING_RETRAIN_CRON, HOUSING_TIMEZONE).",
)


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
    history = table([change.model_dump(mode="json") for change in version.status_history])
    metadata = {"model_version": version.reference, "approval_status": version.status, "history": history}
    context.log_event(dg.AssetObservation(asset_key="registered_model", metadata=metadata))


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


JOBS = [ingest, retrain, deploy_endpoint, rollback_endpoint, approve_model, reject_model]

_CHECKED = dg.AutomationCondition.all_deps_blocking_checks_passed()
_FOLLOWS = dg.AutomationCondition.eager() & _CHECKED
_CONDITIONS: Mapping[str, dg.AutomationCondition] = {
    # Days without files have no partition of the feature group: they are not something to wait for.
    **dict.fromkeys(
        ("train_split", "validation_split", "test_split"),
        dg.AutomationCondition.eager().without(~dg.AutomationCondition.any_deps_missing()) & _CHECKED,
    ),
    # New data alone does not retrain: the schedule does, or a check that found the data shifted.
    "tuned_model": (
        dg.AutomationCondition.any_deps_match(
            dg.AutomationCondition.any_checks_match(dg.AutomationCondition.check_failed())
        )
        .newly_true()
        .since_last_handled()
        & _CHECKED
        & ~dg.AutomationCondition.any_deps_in_progress()
        & ~dg.AutomationCondition.in_progress()
    ).with_label("an input's check has failed"),
    "evaluation_report": _FOLLOWS,
    "registered_model": _FOLLOWS,
}


def automated(spec: dg.AssetSpec) -> dg.AssetSpec:
    """`spec` with its automation condition and its freshness policy, if it has any."""
    condition = _CONDITIONS.get(spec.key.to_user_string())
    if condition is not None:
        spec = spec.replace_attributes(automation_condition=condition)
    if spec.key.to_user_string() in ("registered_model", "endpoint"):
        stale = timedelta(days=_SETTINGS.freshness_days)
        spec = spec.replace_attributes(freshness_policy=dg.FreshnessPolicy.time_window(stale, warn_window=stale * 0.9))
    return spec
