"""Notifications, and what checks have found before: one is sent when a check gets worse, not at every evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import (  # has no public name
    AssetCheckExecutionRecordStatus,
)

from resources.services.notifier import Notifier
from resources.services.optional import attempt
from step_scripts.runner.wording import number

# Metadata of a failed check: the severity of the last notification. In the metadata of another failure: whatever failed
# has sent its own notification.
NOTIFIED = "notified"
_NOT_NOTIFIED = "none"
_RANKS = {_NOT_NOTIFIED: 0, dg.AssetCheckSeverity.WARN.value: 1, dg.AssetCheckSeverity.ERROR.value: 2}
_FINISHED = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}
_ROWS, _LENGTH = 10, 200  # of tables and texts in a message


def finished_checks(
    instance: dg.DagsterInstance, key: dg.AssetCheckKey, limit: int
) -> Iterator[tuple[dg.AssetCheckEvaluation, str]]:
    """The last finished evaluations of a check with the ids of their runs, the latest first."""
    records = instance.event_log_storage.get_asset_check_execution_history(key, limit=limit, status=_FINISHED)
    found = [(record.event, record.run_id) for record in records if record.event is not None]
    # The event log has them in the order in which they were planned, which with runs at once is another one.
    for event, run_id in sorted(found, key=lambda pair: pair[0].timestamp, reverse=True):
        if event.dagster_event is not None:
            yield event.dagster_event.asset_check_evaluation_data, run_id


def send(notifier: Notifier, title: str, lines: Sequence[str], log: Any) -> str | None:
    """Send one message. Returns why that did not work, if it did not, and logs it."""
    if problem := attempt(lambda: notifier.notify(title, "\n".join(lines))):
        log.warning(f"The notification '{title}' could not be sent: {problem}")
    return problem


def notify_on_degradation(
    result: dg.AssetCheckResult, key: dg.AssetCheckKey, remedy: str, notifier: Notifier, instance: dg.DagsterInstance
) -> dg.AssetCheckResult:
    """Send a notification if the check fails and passed before, or if it had only warned.

    Returns the result with the notified severity in its metadata, which the next evaluation reads: a notification that
    could not be sent is sent then.
    """
    if result.passed:
        return result
    level, known = result.severity.value, _NOT_NOTIFIED
    before = next(finished_checks(instance, key, limit=1), None)
    if before is not None and not before[0].passed and NOTIFIED in before[0].metadata:
        known = str(before[0].metadata[NOTIFIED].value)  # of the last notification since the check passed last
    facts: dict[str, Any] = {NOTIFIED: level}
    if _RANKS[level] > _RANKS[known]:
        title = f"Check {key.name} of {key.asset_key.to_user_string()} failed ({level.lower()})"
        lines = [result.description or "", *_figures(result.metadata), f"Remedy: {remedy}"]
        if problem := send(notifier, title, lines, dg.get_dagster_logger()):
            facts = {NOTIFIED: known, "message_not_sent": problem}
    return result.with_metadata({**(result.metadata or {}), **facts})


def _figures(metadata: Mapping[str, Any] | None) -> Iterator[str]:
    for name, value in (metadata or {}).items():
        found = value.value if isinstance(value, dg.MetadataValue) else value
        if isinstance(value, dg.TableMetadataValue):
            for record in value.records[:_ROWS]:
                yield f"{name}: " + " ".join(str(cell) for cell in record.data.values())
        elif isinstance(found, str | int | float):
            yield f"{name}: {found if isinstance(found, str | int) else number(found)}"[:_LENGTH]
