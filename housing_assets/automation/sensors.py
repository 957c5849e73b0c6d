"""Sensors: files that arrive, versions that are approved, runs that fail.

All of them are off until they are switched on in the UI, so that a daemon on a laptop starts nothing by itself.
"""

import time
from typing import Any, TypeVar

import dagster as dg
from dagster._core.storage.tags import RUN_KEY_TAG  # has no public name
from pydantic import BaseModel, ValidationError

from housing_assets.assets.landing import LandingCursor, files_by_day, run_key
from housing_assets.automation.jobs import deploy_endpoint, ingest
from housing_assets.checks.alerts import NOTIFIED, send
from housing_assets.checks.serving import watch_endpoint
from housing_assets.reporting.summary import said
from housing_assets.runs.executor import BUSY
from housing_assets.settings import Settings
from resources.endpoints.base import EndpointHost
from resources.model_registry.base import ModelRegistry, ModelVersion, ModelVersionNotFound, RegistryDamaged
from resources.services.notifier import Notifier
from resources.sources.listing import list_landing
from step_scripts.runner.wording import counted, listed

_Cursor = TypeVar("_Cursor", bound=BaseModel)
_SETTINGS = Settings.load()

keep_up_to_date = dg.AutomationConditionSensorDefinition(
    "keep_up_to_date",
    target=dg.AssetSelection.all(),
    description="Lets assets follow their inputs where blocking checks passed; retrains when data has drifted.",
)


@dg.sensor(
    job=ingest,
    minimum_interval_seconds=30,
    description="Ingests CSV files that arrive in HOUSING_LANDING, once they no longer change: one run a day of data.",
)
def landing_files(context: dg.SensorEvaluationContext, notifier: Notifier) -> dg.SensorResult | dg.SkipReason:
    """New and replaced files, each batch once, whatever happens to the daemon; others are reported once."""
    landing = _SETTINGS.landing
    if landing is None:
        return dg.SkipReason("HOUSING_LANDING is not set: there is no landing place to watch")
    listing = list_landing(landing)
    if listing is None:
        return dg.SkipReason(f"there is no {landing} yet")
    now = time.time()
    by_day, aside = files_by_day(listing, landing, _SETTINGS.timezone, _SETTINGS.landing_start, now)
    cursor = _read(LandingCursor, context)
    batches, waiting, following = cursor.look(by_day, now, _SETTINGS.settle_seconds)
    fresh, notified = following.unreported(aside)
    if not fresh or _notified(context, notifier, f"{landing} holds what cannot be ingested now", list(map(str, fresh))):
        following = notified
    requests = [
        dg.RunRequest(
            run_key=_unused_run_key(context.instance, run_key(day, files)),
            partition_key=str(day),
            tags={"housing/files": str(len(files))},
        )
        for day, files in batches.items()
    ]
    skipped = f"no new files; {waiting} are still changing or seen once"
    if aside:
        skipped += f"; {len(aside)} are set aside ({listed([item.name for item in aside])})"
    if listing.others:
        skipped += f"; not taken, because no CSV file: {listed(listing.others)}"
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else dg.SkipReason(skipped),
        cursor=following.model_dump_json(),
    )


def _read(kind: type[_Cursor], context: dg.SensorEvaluationContext) -> _Cursor:
    """The sensor's cursor; a new one where there is none, or where the text is none."""
    try:
        return kind.model_validate_json(context.cursor) if context.cursor else kind()
    except ValidationError:
        context.log.warning(f"the cursor is taken as reset: {context.cursor!r} is no cursor of this sensor")
        return kind()


def _notified(context: dg.SensorEvaluationContext, notifier: Notifier, title: str, lines: list[str]) -> bool:
    """Send one message of what is set aside. Returns whether that worked; if not, the next evaluation tries again."""
    text = [listed(lines, sign="\n"), "Set aside; the others go on."]
    context.log.warning("\n".join([title, *text]))
    return send(notifier, title, text, context.log) is None


def _unused_run_key(instance: dg.DagsterInstance, key: str) -> str:
    """`key`, with a number at its end if runs have had it: Dagster drops, without a reason, what has a used key.

    A sensor asks for the same again where its cursor was reset, or where a file was removed and has come back.
    """
    number, found = 1, key
    while instance.get_runs_count(dg.RunsFilter(tags={RUN_KEY_TAG: found})):
        number += 1
        found = f"{key}-{number}"
    return found


@dg.sensor(
    job=deploy_endpoint,
    minimum_interval_seconds=30,
    description="Deploys a model version, once, when it is approved: by approve_model, or in the SageMaker console.",
)
def approved_models(
    context: dg.SensorEvaluationContext, model_registry: ModelRegistry, endpoint_host: EndpointHost, notifier: Notifier
) -> dg.SensorResult | dg.SkipReason:
    """The latest approved version, unless it is served already, or this sensor has asked for it before.

    A version that cannot be read is set aside, and reported once.
    """
    group, endpoint = model_registry.default_group, endpoint_host.default_name
    cursor = _read(_DeploymentCursor, context)
    damaged: dict[str, str] = {}
    version = _latest_intact(model_registry, group, damaged)
    fresh = [damaged[name] for name in sorted(damaged) if name not in cursor.notified]
    title = f"{counted(len(fresh), 'version')} of model group {group} cannot be read"
    if not fresh or _notified(context, notifier, title, fresh):
        cursor.notified = sorted(damaged)

    def nothing(reason: str) -> dg.SensorResult:
        aside = f"; set aside: {listed(sorted(damaged))}" if damaged else ""
        return dg.SensorResult(skip_reason=dg.SkipReason(reason + aside), cursor=cursor.model_dump_json())

    if version is None:
        return nothing(f"model group {group} has no approved version")
    if version.version <= cursor.version:
        return nothing(f"{version.reference} has been handed on before")
    status = endpoint_host.describe(endpoint)
    if status is not None and status.version == version.reference and status.state == "InService":
        cursor.version = version.version
        return nothing(f"{version.reference} is served already")
    served_group, _, served = status.version.rpartition("/") if status is not None else ("", "", "")
    if served_group == group and served.isdecimal() and int(served) > version.version:
        return nothing(f"{group}/{served} is served, a later version; job rollback_endpoint goes back")
    key = f"deploy-{version.reference}-{version.artifact.digest[:12]}"
    busy = dg.RunsFilter(tags={RUN_KEY_TAG: key}, statuses=BUSY)
    if run := next(iter(context.instance.get_runs(busy, limit=1)), None):
        return nothing(f"run {run.run_id[:8]} is about to deploy {version.reference}")
    cursor.version = version.version
    request = dg.RunRequest(
        run_key=_unused_run_key(context.instance, key),
        run_config={"ops": {"endpoint": {"config": {"version": version.version}}}},
    )
    return dg.SensorResult(run_requests=[request], cursor=cursor.model_dump_json())


class _DeploymentCursor(BaseModel):
    """The highest version that the sensor has asked for, and the damaged versions that were reported."""

    version: int = 0
    notified: list[str] = []


def _latest_intact(registry: ModelRegistry, group: str, damaged: dict[str, str]) -> ModelVersion | None:
    """The latest approved version whose files are as they were registered; others are put into `damaged`."""
    for version in reversed(registry.list(group, "Approved", damaged)):
        try:
            return registry.get(group, version.version)
        except ModelVersionNotFound:  # deleted in the meantime
            continue
        except RegistryDamaged as error:
            damaged[version.reference] = str(error)
    return None


@dg.run_failure_sensor(
    name="failed_runs",
    monitor_all_code_locations=False,
    description="Sends a notification about each failed run: in the log, by Slack, e-mail or SNS (HOUSING_NOTIFIER).",
)
def failed_runs(context: dg.RunFailureSensorContext, notifier: Notifier) -> None:
    """One message a failed run, with the steps that failed and why; none if what failed has sent its own."""
    run = context.dagster_run
    failures = [(event.step_key, event.step_failure_data) for event in context.get_step_failure_events()]
    if failures and all(_notifies_itself(run, data) for _, data in failures):
        return
    reasons = [f"{step}: {said(data.error)}" for step, data in failures if data.error]
    names = sorted(key.to_user_string() for key in run.asset_selection or ())
    what = ", ".join(names) or f"job {run.job_name}"
    title = f"Run {run.run_id[:8]} of {what} failed"
    send(notifier, title, reasons or [context.failure_event.message or ""], context.log)


def _notifies_itself(run: dg.DagsterRun, failure: Any) -> bool:
    """Whether it is a finding of the watch or the sweep, which recur with every tick and notify once."""
    if failure.user_failure_data:
        return NOTIFIED in failure.user_failure_data.metadata
    is_check = failure.error is not None and failure.error.cls_name == "DagsterAssetCheckFailedError"
    return is_check and run.job_name == watch_endpoint.name


SENSORS = [keep_up_to_date, landing_files, approved_models, failed_runs]
