"""Watching the endpoint: does it serve an approved version, and does the traffic look like the training data?

The two checks are in `housing_assets.checks.serving`; the job runs them alone, so that their numbers become curves in
the UI. They send one notification when they fail, not one at every evaluation. A failed health check fails its run.
"""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from housing_assets.checks.stability import PSI_THRESHOLD, stability_result
from housing_assets.config import EndpointConfig
from housing_assets.settings import load_automation
from resources.endpoints.base import PROBE_ID, EndpointHost, EndpointNotFound, EndpointStatus, InvocationFailed
from resources.model_registry.base import ModelRegistry, ModelVersion, ModelVersionNotFound, RegistryDamaged
from resources.services.optional import attempt

if TYPE_CHECKING:
    from step_scripts.serving.capture import CapturedRows

HEALTH_CHECK, DRIFT_CHECK = "endpoint_health", "prediction_drift"
REMEDIES = {
    HEALTH_CHECK: "job deploy_endpoint deploys a version again (configuration: version), rollback_endpoint goes back "
    "to the one before; approve_model and reject_model decide.",
    DRIFT_CHECK: "see the indices of the columns. If the world has changed, ingest newer data and launch job retrain; "
    "if the requests are wrong, correct who sends them.",
}
_PREDICTIONS = "predictions"
_PROBES = 5
_TOLERANCE = 1e-5  # relative; only the text form of a number may differ
_MOST_ROWS = 20_000

_SETTINGS = load_automation()

watch_endpoint = dg.define_asset_job(
    "watch_endpoint",
    selection=dg.AssetSelection.checks(
        *(dg.AssetCheckKey(dg.AssetKey("endpoint"), name) for name in (HEALTH_CHECK, DRIFT_CHECK))
    ),
    description="Runs the endpoint's health and drift checks alone: does it answer, and is it asked what it was "
    "trained for? Alerts when one of them fails, once. Fails if the endpoint does not serve an approved version.",
)
endpoint_watch = dg.ScheduleDefinition(
    name="endpoint_watch",
    job=watch_endpoint,
    cron_schedule=_SETTINGS.watch_cron,
    execution_timezone=_SETTINGS.timezone,
    description="Looks at the endpoint, every 15 minutes by default (HOUSING_WATCH_CRON, HOUSING_TIMEZONE).",
)


def endpoint_name(instance: dg.DagsterInstance, endpoint_host: EndpointHost) -> str:
    """The endpoint that was deployed last, or the one that would be."""
    event = instance.get_latest_materialization_event(dg.AssetKey("endpoint"))
    found = event.asset_materialization.metadata.get("endpoint_name") if event and event.asset_materialization else None
    return str(found.value) if found else EndpointConfig().endpoint_name or endpoint_host.default_name


@dataclass(frozen=True)
class Probe:
    """Answers to one typical row. `expected` is the model's own prediction."""

    expected: float
    served: float
    milliseconds: list[float]

    @property
    def agrees(self) -> bool:
        """Whether the endpoint predicts what the model does."""
        return abs(self.served - self.expected) <= _TOLERANCE * max(abs(self.expected), 1.0)


def health(name: str, endpoint_host: EndpointHost, model_registry: ModelRegistry) -> dg.AssetCheckResult:
    """Passed if the endpoint answers, and answers with a version that is approved now."""
    status = endpoint_host.describe(name)
    result = _health(name, status, endpoint_host, model_registry)
    after = endpoint_host.describe(name)
    if result.passed or same_deployment(status, after):
        return result
    return _health(name, after, endpoint_host, model_registry)  # a deployment came in between


def same_deployment(before: EndpointStatus | None, after: EndpointStatus | None) -> bool:
    """Whether no deployment has changed what is served in the meantime."""
    kept = ("state", "version", "model_digest", "deployed_at")
    return [getattr(before, field, None) for field in kept] == [getattr(after, field, None) for field in kept]


def _health(
    name: str, status: EndpointStatus | None, endpoint_host: EndpointHost, model_registry: ModelRegistry
) -> dg.AssetCheckResult:
    if status is None:
        return _ill(f"there is no endpoint {name}: materialize endpoint", {"endpoint_name": name})
    group, number = _parts(status.version)
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
    except ModelVersionNotFound as error:
        return _ill(f"{name} serves {status.version}, which the registry does not have: {error}", facts)
    except RegistryDamaged as error:
        return _ill(f"{name} serves {status.version}, which the registry cannot read: {error}", facts)
    if version.artifact.digest != status.model_digest:
        return _ill(f"{name} serves another model than {status.version} of the registry: materialize endpoint", facts)
    try:
        probe = _probe(name, version, endpoint_host)
    except (EndpointNotFound, InvocationFailed) as error:
        return _ill(f"{name} does not answer a typical row (look into its log): {error}", facts)
    facts |= {
        "requests": len(probe.milliseconds),
        "median_milliseconds": round(statistics.median(probe.milliseconds), 3),
        "slowest_milliseconds": round(max(probe.milliseconds), 3),
        "relative_difference": abs(probe.served - probe.expected) / max(abs(probe.expected), 1.0),
    }
    if not probe.agrees:
        return _ill(f"{name} predicts {probe.served!r} where {status.version} predicts {probe.expected!r}", facts)
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


def _parts(reference: str) -> tuple[str, int]:
    group, _, number = reference.rpartition("/")
    return group, int(number)


def _probe(name: str, version: ModelVersion, endpoint_host: EndpointHost) -> Probe:
    """Ask for a typical row some times. Raises `EndpointNotFound`, `InvocationFailed`."""
    from step_scripts.model.artifact import load_model

    model = load_model(version.artifact.uri, threads=1)
    row = typical_row(version)
    body = row.write_csv(include_header=False).encode()
    served, milliseconds = float("nan"), []
    for _ in range(_PROBES):
        start = time.perf_counter()
        served = float(endpoint_host.invoke(name, body, "text/csv", "text/csv", inference_id=PROBE_ID))
        milliseconds.append((time.perf_counter() - start) * 1000)
    return Probe(float(model.predict(row)[0]), served, milliseconds)


def typical_row(version: ModelVersion) -> Any:
    """One row (a Polars frame) of the training data's medians: valid, whatever the table."""
    import math

    import polars as pl

    from step_scripts.runner import storage
    from step_scripts.table.distributions import quantile
    from step_scripts.table.spec import TableSpec

    table = TableSpec.model_validate_json(storage.read_bytes(version.artifact.file_uri("table.json")))
    known = _distributions(version)
    means = json.loads(storage.read_bytes(version.artifact.file_uri("scaler.json")))["mean"]
    values: dict[str, list[float | int]] = {}
    for feature in table.features:
        median = quantile(known[feature], 0.5) if feature in known else math.nan
        typical = median if math.isfinite(median) else float(means[feature])
        values[feature] = [round(typical) if table.column(feature).dtype in ("int64", "bool") else typical]
    return pl.DataFrame(values)


def _distributions(version: ModelVersion) -> dict[str, Any]:
    """Distributions in the training split, by column."""
    from step_scripts.runner import storage

    return json.loads(storage.read_bytes(version.artifact.file_uri("statistics.json"))).get("distributions", {})


def drift(name: str, endpoint_host: EndpointHost, model_registry: ModelRegistry) -> dg.AssetCheckResult:
    """Passed if captured features and predictions are distributed as the served model's training data, or if there is
    too little to judge."""
    from step_scripts.runner import storage
    from step_scripts.table.spec import TableSpec

    status = endpoint_host.describe(name)
    if status is None:
        return dg.AssetCheckResult(passed=True, description=f"there is no endpoint {name}")
    try:
        version = model_registry.get(*_parts(status.version))
    except (ModelVersionNotFound, RegistryDamaged) as error:
        return dg.AssetCheckResult(passed=True, description=f"nothing to compare with: {error}")
    table = TableSpec.model_validate_json(storage.read_bytes(version.artifact.file_uri("table.json")))
    since = max(status.deployed_at, datetime.now(UTC) - timedelta(days=_SETTINGS.drift_days))
    read: list[CapturedRows | None] = []
    if problem := attempt(lambda: read.append(endpoint_host.captured(name, table, since, _MOST_ROWS))):
        return dg.AssetCheckResult(
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"captured requests cannot be read: {problem}",
        )
    rows = read[0]
    if rows is None:
        return dg.AssetCheckResult(passed=True, description="requests are not captured (HOUSING_DATA_CAPTURE=on)")
    facts: dict[str, Any] = {
        "model_version": version.reference,
        "captured_rows": rows.rows,
        "captured_requests": rows.requests,
        "unreadable_lines": rows.unreadable,
        "since": (rows.oldest or since).isoformat(),
        "threshold": PSI_THRESHOLD,
    }
    if rows.rows < _SETTINGS.drift_rows:
        reason = f"not enough captured rows: {rows.rows} since {since:%Y-%m-%d %H:%M}, {_SETTINGS.drift_rows} needed"
        return dg.AssetCheckResult(passed=True, description=reason, metadata=facts)
    found = _stability(_distributions(version), rows, table)
    if not found:
        return dg.AssetCheckResult(passed=True, description=f"{version.reference} has no statistics", metadata=facts)
    if _PREDICTIONS in found:
        facts["predictions_psi"] = found[_PREDICTIONS]
    return stability_result(found, version.reference, facts)


def _stability(known: Mapping[str, Any], rows: "CapturedRows", table: Any) -> dict[str, float]:
    """Population stability index of each feature; of the predictions, against the target."""
    from step_scripts.table.distributions import distribution_of, psi

    current = {name: rows.features[:, index] for index, name in enumerate(table.features)}
    found = {
        name: round(psi(known[name], distribution_of(values)), 4) for name, values in current.items() if name in known
    }
    if table.target in known:
        found[_PREDICTIONS] = round(psi(known[table.target], distribution_of(rows.predictions)), 4)
    return found
