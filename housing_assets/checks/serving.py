"""Checks of the endpoint."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import dagster as dg

from housing_assets.checks import watching
from housing_assets.checks.advisory import advisory_check, judged
from housing_assets.checks.alerts import notify_on_degradation
from housing_assets.checks.blocking import blocking_check
from resources.endpoints.base import PROBE_ID, EndpointHost, EndpointStatus
from resources.model_registry.base import ModelRegistry
from resources.references.evidence import Judged
from resources.references.types import SplitRef
from resources.services.notifier import Notifier
from step_scripts.runner.wording import counted

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
    status = endpoint_host.describe(endpoint.name) or endpoint
    result = _served(status, test_split, endpoint_host, model_registry)
    after = endpoint_host.describe(endpoint.name) or status
    if result.passed or watching.same_deployment(status, after):
        return result
    return _served(after, test_split, endpoint_host, model_registry)


def _served(
    endpoint: EndpointStatus, test_split: SplitRef, endpoint_host: EndpointHost, model_registry: ModelRegistry
) -> dg.AssetCheckResult:
    from housing_assets.checks.smoke_test import smoke_test_from

    group, _, number = endpoint.version.rpartition("/")
    test = smoke_test_from(model_registry.get(group, int(number)).artifact, test_split.rows, ROWS)
    served: list[float] = []
    milliseconds: list[float] = []
    for row in test.body.splitlines():
        start = time.perf_counter()
        answer = endpoint_host.invoke(endpoint.name, row.encode(), "text/csv", "text/csv", inference_id=PROBE_ID)
        milliseconds.append((time.perf_counter() - start) * 1000)
        served.append(float(answer))
    errors = [abs(s - e) / max(abs(e), 1.0) for s, e in zip(served, test.expected, strict=True)]
    worst = max(errors)
    return dg.AssetCheckResult(
        passed=worst <= test.tolerance,
        description=f"largest relative difference {worst:.1e} over {counted(len(served), 'row')}",
        metadata={
            "model_version": endpoint.version,
            "rows": len(served),
            "largest_relative_difference": worst,
            "threshold": test.tolerance,
            "median_milliseconds": round(statistics.median(milliseconds), 3),
            "slowest_milliseconds": round(max(milliseconds), 3),
        },
    )


@blocking_check(asset="endpoint", name=watching.HEALTH_CHECK, judged=_looked_at)
def endpoint_health(
    context: dg.AssetCheckExecutionContext,
    endpoint_host: EndpointHost,
    model_registry: ModelRegistry,
    notifier: Notifier,
) -> dg.AssetCheckResult:
    """The endpoint answers a typical row as its model does, and the version that it serves is approved.

    A warning if another version has been approved since and waits to be deployed.
    """
    name = watching.endpoint_name(context.instance, endpoint_host)
    return _told(watching.health(name, endpoint_host, model_registry), watching.HEALTH_CHECK, context, notifier)


_LOOK_AGAIN = "look into the endpoint's log and its captured requests; job watch_endpoint looks again"


@advisory_check(asset="endpoint", name=watching.DRIFT_CHECK, remedy=_LOOK_AGAIN)
def prediction_drift(
    context: dg.AssetCheckExecutionContext,
    endpoint_host: EndpointHost,
    model_registry: ModelRegistry,
    notifier: Notifier,
) -> dg.AssetCheckResult:
    """Features and predictions of captured requests are distributed as the training data of the served model (PSI)."""
    name = watching.endpoint_name(context.instance, endpoint_host)
    result = judged(lambda: watching.drift(name, endpoint_host, model_registry), _LOOK_AGAIN)
    return _told(result, watching.DRIFT_CHECK, context, notifier)


def _told(
    result: dg.AssetCheckResult, check: str, context: dg.AssetCheckExecutionContext, notifier: Notifier
) -> dg.AssetCheckResult:
    key = dg.AssetCheckKey(dg.AssetKey("endpoint"), check)
    return notify_on_degradation(result, key, watching.REMEDIES[check], notifier, context.instance)
