"""Checks of the endpoint."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from housing_assets.checks import watching
from housing_assets.checks.advisory import advisory_check, judged
from housing_assets.checks.alerts import notify_on_degradation
from housing_assets.checks.blocking import blocking_check
from housing_assets.checks.smoke_test import ask, smoke_test_from
from resources.endpoints.base import EndpointHost, EndpointStatus
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

    def judge(status: EndpointStatus | None) -> dg.AssetCheckResult:
        return _served(status or endpoint, test_split, endpoint_host, model_registry)

    return watching.unless_redeployed(endpoint.name, endpoint_host, judge)


def _served(
    endpoint: EndpointStatus, test_split: SplitRef, endpoint_host: EndpointHost, model_registry: ModelRegistry
) -> dg.AssetCheckResult:
    group, _, number = endpoint.version.rpartition("/")
    test = smoke_test_from(model_registry.get(group, int(number)).artifact, test_split.rows, ROWS)
    answers = ask(endpoint_host, endpoint.name, test)
    rows = len(answers.served)
    return dg.AssetCheckResult(
        passed=answers.difference <= test.tolerance,
        description=f"largest relative difference {answers.difference:.1e} over {counted(rows, 'row')}",
        metadata={
            "model_version": endpoint.version,
            "rows": rows,
            "largest_relative_difference": answers.difference,
            "threshold": test.tolerance,
            **answers.latency,
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

    def judge(status: EndpointStatus | None) -> dg.AssetCheckResult:
        return watching.health(name, status, endpoint_host, model_registry)

    result = watching.unless_redeployed(name, endpoint_host, judge)
    return _notified(result, watching.HEALTH_CHECK, context, notifier)


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
    return _notified(result, watching.DRIFT_CHECK, context, notifier)


def _notified(
    result: dg.AssetCheckResult, check: str, context: dg.AssetCheckExecutionContext, notifier: Notifier
) -> dg.AssetCheckResult:
    key = dg.AssetCheckKey(dg.AssetKey("endpoint"), check)
    return notify_on_degradation(result, key, watching.REMEDIES[check], notifier, context.instance)
