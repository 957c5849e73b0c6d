"""Checks of the endpoint."""

import statistics
import time

import dagster as dg

from resources.endpoints.base import EndpointHost, EndpointStatus
from resources.model_registry.base import ModelVersion
from resources.references import SplitRef

ROWS = 100


@dg.asset_check(
    asset="endpoint",
    additional_ins={"registered_model": dg.AssetIn("registered_model"), "test_split": dg.AssetIn("test_split")},
    blocking=True,
)
def serves_offline_predictions(
    endpoint: EndpointStatus, registered_model: ModelVersion, test_split: SplitRef, endpoint_host: EndpointHost
) -> dg.AssetCheckResult:
    """What the endpoint answers to known raw rows equals what the registered model predicts offline."""
    from housing_assets.smoke_test import smoke_test_from

    test = smoke_test_from(registered_model.artifact, test_split.rows, ROWS)
    served: list[float] = []
    milliseconds: list[float] = []
    for row in test.body.splitlines():
        start = time.perf_counter()
        answer = endpoint_host.invoke(endpoint.name, row.encode(), "text/csv", "text/csv")
        milliseconds.append((time.perf_counter() - start) * 1000)
        served.append(float(answer))
    errors = [abs(s - e) / max(abs(e), 1.0) for s, e in zip(served, test.expected, strict=True)]
    worst = max(errors)
    return dg.AssetCheckResult(
        passed=worst <= test.tolerance,
        description=f"largest relative difference {worst:.1e} over {len(served)} rows",
        metadata={
            "rows": len(served),
            "largest_relative_difference": worst,
            "threshold": test.tolerance,
            "median_milliseconds": round(statistics.median(milliseconds), 3),
            "slowest_milliseconds": round(max(milliseconds), 3),
        },
    )
