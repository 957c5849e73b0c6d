"""What checks have found before."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
from dagster._core.storage.asset_check_execution_record import (  # has no public name
    AssetCheckExecutionRecordStatus,
)

_FINISHED = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}


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
