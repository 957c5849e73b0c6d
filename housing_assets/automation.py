"""What makes the platform run by itself: sensors, the schedule, and conditions under which assets follow their inputs.

Everything here is stopped until somebody switches it on in the UI, so that a daemon on a laptop surprises nobody.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from housing_assets.alerts import TOLD
from housing_assets.deployments import load_automation
from housing_assets.landing import LandingCursor, batches, landed_files, run_key
from housing_assets.watching import watch_endpoint
from resources.endpoints.base import EndpointHost
from resources.model_registry.base import ModelRegistry
from resources.notifier import Notifier
from resources.optional_services import attempt

_SETTINGS = load_automation()
_INGESTION = dg.AssetSelection.assets("raw_csv", "feature_group")
_TRAINING = dg.AssetSelection.assets(
    "train_split", "validation_split", "test_split", "tuned_model", "evaluation_report", "registered_model"
)
_ENDPOINT = dg.AssetSelection.assets("endpoint")  # a text would be parsed, by a parser that takes 0.05 s to import

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
        stale = _SETTINGS.stale_after
        spec = spec.replace_attributes(freshness_policy=dg.FreshnessPolicy.time_window(stale, warn_window=stale * 0.9))
    return spec


keep_up_to_date = dg.AutomationConditionSensorDefinition(
    "keep_up_to_date",
    target=dg.AssetSelection.all(),
    description="Lets assets follow their inputs where blocking checks passed; retrains when data has drifted.",
)

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


@dg.sensor(
    job=ingest,
    minimum_interval_seconds=30,
    description="Ingests CSV files that arrive in HOUSING_LANDING, once they no longer change: one run a day of data.",
)
def landing_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """New and replaced files, each batch once, whatever happens to the daemon."""
    if _SETTINGS.landing is None:
        return dg.SkipReason("HOUSING_LANDING is not set: there is no landing place to watch")
    cursor = LandingCursor.model_validate_json(context.cursor) if context.cursor else LandingCursor()
    files = landed_files(_SETTINGS.landing)
    batch, following = cursor.look(files, time.time(), _SETTINGS.settle_seconds)
    requests = [
        dg.RunRequest(run_key=run_key(day, of_day), partition_key=str(day), tags={"housing/files": str(len(of_day))})
        for day, of_day in batches(batch, _SETTINGS.landing).items()
    ]
    waiting = len(following.seen)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else dg.SkipReason(f"no new files; {waiting} are still changing or seen once"),
        cursor=following.model_dump_json(),
    )


@dg.sensor(
    job=deploy_endpoint,
    minimum_interval_seconds=30,
    description="Deploys a model version, once, when it is approved: by approve_model, or in the SageMaker console.",
)
def approved_models(
    context: dg.SensorEvaluationContext, model_registry: ModelRegistry, endpoint_host: EndpointHost
) -> dg.SensorResult | dg.SkipReason:
    """The latest approved version, unless it is served already, or this sensor has asked for it before."""
    group, endpoint = model_registry.default_group, endpoint_host.default_name
    version = model_registry.latest(group, "Approved")
    if version is None:
        return dg.SkipReason(f"model group {group} has no approved version")
    handled = int(json.loads(context.cursor)["version"]) if context.cursor else 0
    if version.version <= handled:
        return dg.SkipReason(f"{version.reference} has been handed on before")
    cursor = json.dumps({"version": version.version})
    status = endpoint_host.describe(endpoint)
    if status is not None and status.version == version.reference and status.state == "InService":
        return dg.SensorResult(skip_reason=dg.SkipReason(f"{version.reference} is served already"), cursor=cursor)
    request = dg.RunRequest(
        run_key=f"deploy-{version.reference}-{version.artifact.digest[:12]}",
        run_config={"ops": {"endpoint": {"config": {"version": version.version}}}},
    )
    return dg.SensorResult(run_requests=[request], cursor=cursor)


@dg.run_failure_sensor(
    name="failed_runs",
    monitor_all_code_locations=False,
    description="Tells people about failed runs: in the log, by Slack, e-mail or SNS (HOUSING_NOTIFIER).",
)
def failed_runs(context: dg.RunFailureSensorContext, notifier: Notifier) -> None:
    """One message a failed run, with the steps that failed and why; none where what failed tells people itself."""
    run = context.dagster_run
    if (failures := _failures(context)) and all(_tells_itself(run, failure) for failure in failures):
        return
    reasons = "\n".join(_reasons(context)) or context.failure_event.message or ""
    title = f"Run {run.run_id[:8]} of {_what(run)} failed"
    if problem := attempt(lambda: notifier.notify(title, reasons)):
        context.log.warning(f"People could not be told that {title[0].lower()}{title[1:]}: {problem}")


def _failures(context: dg.RunFailureSensorContext) -> list[Any]:
    return [event.step_failure_data for event in context.get_step_failure_events()]


def _tells_itself(run: dg.DagsterRun, failure: Any) -> bool:
    """Whether it is a finding of the watch or the sweep, which recur with every tick and are told once."""
    if failure.user_failure_data:
        return TOLD in failure.user_failure_data.metadata
    is_check = failure.error is not None and failure.error.cls_name == "DagsterAssetCheckFailedError"
    return is_check and run.job_name == watch_endpoint.name


def _what(run: dg.DagsterRun) -> str:
    if run.asset_selection:
        return ", ".join(sorted(key.to_user_string() for key in run.asset_selection))
    return f"job {run.job_name}"


def _reasons(context: dg.RunFailureSensorContext) -> Iterator[str]:
    for event in context.get_step_failure_events():
        data: Any = event.step_failure_data
        error = data.error
        while error is not None and error.cause is not None:  # Dagster's own error only names the step
            error = error.cause
        text = data.user_failure_data.description if data.user_failure_data else error and error.message
        yield f"{event.step_key}: {(text or event.message or '').strip()}"


jobs = [ingest, retrain, deploy_endpoint, rollback_endpoint]
schedules = [weekly_retraining]
sensors = [keep_up_to_date, landing_files, approved_models, failed_runs]
