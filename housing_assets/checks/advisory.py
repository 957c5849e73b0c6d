"""Advisory checks: they warn, and never fail the run that they are in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dagster as dg

from resources.compute.base import as_metadata


def guarded(check: Callable[[], dg.AssetCheckResult], remedy: str) -> dg.AssetCheckResult:
    """The result of `check`; a failed one that warns, with the reason and what people can do, if it raises."""
    try:
        return check()
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  # becomes the result; a panic of Polars is no Exception
        reason = f"{type(error).__name__}: {error}"
        return dg.AssetCheckResult(
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"could not be judged: {reason}. Remedy: {remedy}.",
            metadata={"error": reason},
        )


def advisory_check(*, asset: str, remedy: str, **options: Any) -> Callable[[Callable[..., dg.AssetCheckResult]], Any]:
    """As `dagster.asset_check`, for a check that blocks nothing: what it raises becomes a failed result that warns.

    By then its run may have deployed something, so that nothing may fail it.
    """

    def decorate(check: Callable[..., dg.AssetCheckResult]) -> Any:
        @functools.wraps(check)
        def evaluate(*arguments: Any, **named: Any) -> dg.AssetCheckResult:
            result = guarded(lambda: check(*arguments, **named), remedy)
            return result.with_metadata(as_metadata(result.metadata))

        return dg.asset_check(asset=asset, blocking=False, **options)(evaluate)

    return decorate
