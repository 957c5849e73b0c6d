"""Checks of the endpoint: does it answer as its model does, is its version approved, is traffic like training data?

Job `watch_endpoint` runs health and drift alone, so that their numbers become curves in the UI. They send one
notification when they fail, not one at every evaluation. A failed health check fails its run.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from housing_assets.checks.advisory import advisory_check, guarded
from housing_assets.checks.alerts import notify_on_degradation
from housing_assets.checks.blocking import blocking_check
from housing_assets.checks.comparisons import (
    PSI_THRESHOLD,
    RELATIVE_TOLERANCE,
    ask,
    distributions,
    smoke_test_from,
    stability_indices,
    stability_result,
    table_of,
    typical_test,
)
from housing_assets.config import EndpointConfig
from housing_assets.settings import Settings
from resources.endpoints.base import EndpointHost, EndpointNotFound, EndpointStatus, InvocationFailed
from resources.endpoints.captured_files import CapturedRows
from resources.model_registry.base import ModelRegistry, ModelVersionNotFound, RegistryDamaged, split_reference
from resources.references.evidence import Judged
from resources.references.types import SplitRef
from resources.services.notifier import Notifier
from resources.services.optional import attempt
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

HEALTH_CHECK, DRIFT_CHECK = "endpoint_health", "prediction_drift"
REMEDIES = {
    HEALTH_CHECK: "job deploy_endpoint deploys a version again (configuration: version), rollback_endpoint goes back "
    "to the one before; approve_model and reject_model decide.",
    DRIFT_CHECK: "see the indices of the columns. If the world has changed, ingest newer data and launch job retrain; "
    "if the requests are wrong, correct who sends them.",
}
_PREDICTIONS = "predictions"
_PROBES = 5
_MOST_ROWS = 20_000

_SETTINGS = Settings.load()
ROWS = 100


def _looked_at(_: Mapping[str, Any], result: dg.AssetCheckResult) -> Judged:
    """The endpoint and the version that it served; nothing stands behind it."""
    facts = result.metadata or {}
    name, version = (getattr(facts.get(key), "value", "none") for key in ("endpoint_name", "model_version"))
    return Judged(asset="endpoint", subject=str(name), inputs={"endpoint": str(name), "version": str(version)})


@blocking_check(
    asset="endpoint",
    judged=lambda given, _: Judged(
        asset="endpoint",
        subject=given["endpoint"].name,
        inputs={
            "endpoint": given["endpoint"].name,
            "model": given["endpoint"].model_digest,
            "test": given["test_split"].rows.digest,
        },
    ),
    additional_ins={"test_split": dg.AssetIn("test_split")},
)
def serves_offline_predictions(
    endpoint: EndpointStatus, test_split: SplitRef, endpoint_host: EndpointHost, model_registry: ModelRegistry
) -> dg.AssetCheckResult:
    """What the endpoint answers to known raw rows equals what the version that it serves predicts offline.

    Another run may have deployed since, or deploy at the same time: then that version counts.
    """

    def judge(status: EndpointStatus | None) -> dg.AssetCheckResult:
        served = status or endpoint
        test = smoke_test_from(model_registry.get(*split_reference(served.version)).artifact, test_split.rows, ROWS)
        answers = ask(endpoint_host, served.name, test)
        rows, difference = len(answers.rows), max(answers.differences)
        return dg.AssetCheckResult(
            passed=difference <= test.tolerance,
            description=f"largest relative difference {difference:.1e} over {counted(rows, 'row')}",
            metadata={
                "model_version": served.version,
                "rows": rows,
                "largest_relative_difference": difference,
                "threshold": test.tolerance,
                **answers.latency,
            },
        )

    return unless_redeployed(endpoint.name, endpoint_host, judge)


@blocking_check(asset="endpoint", name=HEALTH_CHECK, judged=_looked_at)
def endpoint_health(
    context: dg.AssetCheckExecutionContext,
    endpoint_host: EndpointHost,
    model_registry: ModelRegistry,
    notifier: Notifier,
) -> dg.AssetCheckResult:
    """The endpoint answers a typical row as its model does, and the version that it serves is approved.

    A warning if another version has been approved since and waits to be deployed.
    """
    name = endpoint_name(context.instance, endpoint_host)
    result = unless_redeployed(name, endpoint_host, lambda status: health(name, status, endpoint_host, model_registry))
    return _notified(result, HEALTH_CHECK, context, notifier)


_LOOK_AGAIN = "look into the endpoint's log and its captured requests; job watch_endpoint looks again"


@advisory_check(asset="endpoint", name=DRIFT_CHECK, remedy=_LOOK_AGAIN)
def prediction_drift(
    context: dg.AssetCheckExecutionContext,
    endpoint_host: EndpointHost,
    model_registry: ModelRegistry,
    notifier: Notifier,
) -> dg.AssetCheckResult:
    """Features and predictions of captured requests are distributed as the training data of the served model (PSI)."""
    name = endpoint_name(context.instance, endpoint_host)
    result = guarded(lambda: drift(name, endpoint_host, model_registry), _LOOK_AGAIN)
    return _notified(result, DRIFT_CHECK, context, notifier)


def _notified(
    result: dg.AssetCheckResult, check: str, context: dg.AssetCheckExecutionContext, notifier: Notifier
) -> dg.AssetCheckResult:
    key = dg.AssetCheckKey(dg.AssetKey("endpoint"), check)
    return notify_on_degradation(result, key, REMEDIES[check], notifier, context.instance)


def endpoint_name(instance: dg.DagsterInstance, endpoint_host: EndpointHost) -> str:
    """The endpoint that was deployed last, or the one that would be."""
    event = instance.get_latest_materialization_event(dg.AssetKey("endpoint"))
    found = event.asset_materialization.metadata.get("endpoint_name") if event and event.asset_materialization else None
    return str(found.value) if found else EndpointConfig().endpoint_name or endpoint_host.default_name


def unless_redeployed(
    name: str, host: EndpointHost, judge: Callable[[EndpointStatus | None], dg.AssetCheckResult]
) -> dg.AssetCheckResult:
    """What `judge` finds; a failure is judged again if a deployment came in between."""
    status = host.describe(name)
    result = judge(status)
    after = host.describe(name)
    kept = [(s.state, s.version, s.model_digest, s.deployed_at) if s else None for s in (status, after)]
    return result if result.passed or kept[0] == kept[1] else judge(after)


def health(
    name: str, status: EndpointStatus | None, endpoint_host: EndpointHost, model_registry: ModelRegistry
) -> dg.AssetCheckResult:
    """Passed if the endpoint answers, and answers with a version that is approved now."""
    if status is None:
        return _ill(f"there is no endpoint {name}: materialize endpoint", {"endpoint_name": name})
    group, number = split_reference(status.version)
    facts: dict[str, Any] = {
        "endpoint_name": name,
        "state": status.state,
        "model_version": status.version,
        "version": number,
        "days_deployed": round((datetime.now(UTC) - status.deployed_at) / timedelta(days=1), 3),
    }
    if status.captured is not None:
        facts |= {"captured_requests": status.captured.written, "dropped_requests": status.captured.dropped}
    if status.state != "InService":
        return _ill(f"{name} does not answer ({status.state}): materialize endpoint to start it again", facts)
    try:
        version = model_registry.get(group, number)
    except (ModelVersionNotFound, RegistryDamaged) as error:
        lacks = "does not have" if isinstance(error, ModelVersionNotFound) else "cannot read"
        return _ill(f"{name} serves {status.version}, which the registry {lacks}: {error}", facts)
    if version.artifact.digest != status.model_digest:
        return _ill(f"{name} serves another model than {status.version} of the registry: materialize endpoint", facts)
    try:
        answers = ask(endpoint_host, name, typical_test(version.artifact, _PROBES))
    except (EndpointNotFound, InvocationFailed) as error:
        return _ill(f"{name} does not answer a typical row (look into its log): {error}", facts)
    facts |= {"requests": _PROBES, **answers.latency, "relative_difference": max(answers.differences)}
    if max(answers.differences) > RELATIVE_TOLERANCE:
        wrong = f"{name} predicts {answers.served[-1]!r} where {status.version} predicts {answers.expected[-1]!r}"
        return _ill(wrong, facts)
    if version.status != "Approved":
        last = version.status_history[-1]
        reason = f"{version.status} ({last.who}: {last.why})"
        return _ill(f"{name} serves {status.version}, which is {reason}: deploy or roll back to an approved one", facts)
    latest = model_registry.list(group, "Approved", damaged={})[-1].version
    facts["latest_approved"] = latest
    if latest > number:
        wanted = f"{group}/{latest} is approved, {status.version} is served"
        remedy = "deploy it, or reject it if this is what you rolled back from"
        return _ill(f"{wanted}: {remedy}", facts, dg.AssetCheckSeverity.WARN)
    median = facts["median_milliseconds"]
    return dg.AssetCheckResult(passed=True, description=f"{status.version} answers in {median:g} ms", metadata=facts)


def _ill(
    reason: str, facts: Mapping[str, Any], severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, severity=severity, description=reason, metadata=facts)


def drift(name: str, endpoint_host: EndpointHost, model_registry: ModelRegistry) -> dg.AssetCheckResult:
    """Passed if captured features and predictions are distributed as the served model's training data, or if there is
    too little to judge."""
    status = endpoint_host.describe(name)
    if status is None:
        return dg.AssetCheckResult(passed=True, description=f"there is no endpoint {name}")
    try:
        version = model_registry.get(*split_reference(status.version))
    except (ModelVersionNotFound, RegistryDamaged) as error:
        return dg.AssetCheckResult(passed=True, description=f"nothing to compare with: {error}")
    table = table_of(version.artifact)
    since = max(status.deployed_at, datetime.now(UTC) - timedelta(days=_SETTINGS.drift_days))
    read: list[CapturedRows | None] = []
    if problem := attempt(lambda: read.append(endpoint_host.captured(name, table, since, _MOST_ROWS))):
        return _ill(f"captured requests cannot be read: {problem}", {}, dg.AssetCheckSeverity.WARN)
    if (rows := read[0]) is None:
        return dg.AssetCheckResult(passed=True, description="requests are not captured (HOUSING_DATA_CAPTURE=on)")
    count = len(rows.predictions)
    facts: dict[str, Any] = {
        "model_version": version.reference,
        "captured_rows": count,
        "captured_requests": rows.requests,
        "unreadable_lines": rows.unreadable,
        "since": (rows.oldest or since).isoformat(),
        "threshold": PSI_THRESHOLD,
    }
    if count < _SETTINGS.drift_rows:
        reason = f"not enough captured rows: {count} since {since:%Y-%m-%d %H:%M}, {_SETTINGS.drift_rows} needed"
        return dg.AssetCheckResult(passed=True, description=reason, metadata=facts)
    found = _indices(distributions(version.artifact), rows, table)
    if not found:
        return dg.AssetCheckResult(passed=True, description=f"{version.reference} has no statistics", metadata=facts)
    if _PREDICTIONS in found:
        facts["predictions_psi"] = found[_PREDICTIONS]
    return stability_result(found, version.reference, facts)


def _indices(known: dict[str, Any], rows: CapturedRows, table: TableSpec) -> dict[str, float]:
    """Population stability index of each feature; of the predictions, against the target."""
    from step_scripts.table.distributions import distribution_of

    now = {name: distribution_of(rows.features[:, index]) for index, name in enumerate(table.features)}
    if table.target in known:
        known = {**known, _PREDICTIONS: known[table.target]}
        now[_PREDICTIONS] = distribution_of(rows.predictions)
    return stability_indices(known, now)


watch_endpoint = dg.define_asset_job(
    "watch_endpoint",
    selection=dg.AssetSelection.checks(endpoint_health, prediction_drift),
    description="Runs the endpoint's health and drift checks alone: does it answer, and is it asked what it was "
    "trained for? Alerts when one of them fails, once. Fails if the endpoint does not serve an approved version.",
)
watch_schedule = dg.ScheduleDefinition(
    name="endpoint_watch",
    job=watch_endpoint,
    cron_schedule=_SETTINGS.watch_cron,
    execution_timezone=_SETTINGS.timezone,
    description="Looks at the endpoint, every 15 minutes by default (HOUSING_WATCH_CRON, HOUSING_TIMEZONE).",
)
