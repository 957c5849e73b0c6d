"""Telling people what a check has found: when it gets worse, and not again at every look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from housing_assets.checks.history import finished_checks
from resources.services.notifier import Notifier
from resources.services.optional import attempt
from step_scripts.runner.wording import number

# Metadata of a failed check: the severity that people know of. Of another failure: it has told them, once, itself.
TOLD = "people_were_told"
_UNTOLD = "none"
_RANKS = {_UNTOLD: 0, dg.AssetCheckSeverity.WARN.value: 1, dg.AssetCheckSeverity.ERROR.value: 2}
_ROWS, _LENGTH = 10, 200  # of tables and texts in a message


def tell_if_worse(
    result: dg.AssetCheckResult, key: dg.AssetCheckKey, remedy: str, notifier: Notifier, instance: dg.DagsterInstance
) -> dg.AssetCheckResult:
    """Send a message if the check has failed and had not before, or had only warned.

    The result comes back with what people know in its metadata, which is what the next look goes by: a message that
    could not be sent is sent then.
    """
    if result.passed:
        return result
    level, known = result.severity.value, _known(instance, key)
    facts: dict[str, Any] = {TOLD: level}
    if _RANKS[level] > _RANKS[known]:
        title = f"Check {key.name} of {key.asset_key.to_user_string()} failed ({level.lower()})"
        text = "\n".join([result.description or "", *_figures(result.metadata), f"Remedy: {remedy}"])
        if problem := attempt(lambda: notifier.notify(title, text)):
            facts = {TOLD: known, "message_not_sent": problem}
    return dg.AssetCheckResult(
        passed=False,
        severity=result.severity,
        description=result.description,
        metadata={**(result.metadata or {}), **facts},
    )


def _known(instance: dg.DagsterInstance, key: dg.AssetCheckKey) -> str:
    """The severity of the failure that people have been told of since the check passed last."""
    before = next(finished_checks(instance, key, limit=1), None)
    if before is None or before[0].passed or TOLD not in before[0].metadata:
        return _UNTOLD
    return str(before[0].metadata[TOLD].value)


def _figures(metadata: Mapping[str, Any] | None) -> Iterator[str]:
    for name, value in (metadata or {}).items():
        found = value.value if isinstance(value, dg.MetadataValue) else value
        if isinstance(value, dg.TableMetadataValue):
            for record in value.records[:_ROWS]:
                yield f"{name}: " + " ".join(str(cell) for cell in record.data.values())
        elif isinstance(found, str | int | float):
            yield f"{name}: {found if isinstance(found, str | int) else number(found)}"[:_LENGTH]
