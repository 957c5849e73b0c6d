"""What a job was and what it cost, as Dagster metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import dagster as dg

from resources.sagemaker.job_kinds import TRAINING, JobKind
from step_scripts.runner.wording import rounded

StatusChange = tuple[str, datetime]  # a status, and when it was first seen


def job_metadata(
    kind: JobKind,
    name: str,
    description: Mapping[str, Any],
    price_per_hour: float | None,
    statuses: Sequence[StatusChange],
) -> dict[str, Any]:
    """Name, links, instances, durations, billable seconds, spot savings, estimated cost, status history.

    `price_per_hour` is one instance's; the estimate multiplies it by the billable time of all instances.
    """
    arn = description[kind.arn_member]
    instances = kind.instances(description)
    count = sum(number for _, number in instances)
    metadata: dict[str, Any] = {
        "sagemaker_job": name,
        "sagemaker_job_arn": arn,
        **{what: dg.MetadataValue.url(url) for what, url in kind.links(arn, name).items()},
        "job_status": description[kind.status_member],
        "instance_type": ", ".join(dict.fromkeys(instance for instance, _ in instances)),
        "instance_count": count,
    }
    running = kind.running_seconds(description)
    created, ended = description.get("CreationTime"), description.get(kind.ended)
    if isinstance(created, datetime) and isinstance(ended, datetime):
        metadata["job_seconds"] = round((ended - created).total_seconds(), 1)
    if running is not None:
        metadata["running_seconds"] = round(running, 1)
    billable = description.get("BillableTimeInSeconds") if kind is TRAINING else running
    if billable is not None:
        metadata["billable_seconds"] = round(float(billable), 1)
        if price_per_hour is not None:
            metadata["estimated_cost"] = rounded(price_per_hour * count * float(billable) / 3600)
    trained = description.get("TrainingTimeInSeconds")
    if trained and billable is not None and description.get("EnableManagedSpotTraining"):
        metadata["spot_savings_percent"] = round(100 * (1 - float(billable) / trained), 1)
    if history := status_history(description, statuses):
        metadata["status_history"] = history
    return metadata


def status_history(description: Mapping[str, Any], seen: Sequence[StatusChange]) -> dg.TableMetadataValue | None:
    """SageMaker's own transitions where it gives them (training), else those that were seen."""
    rows = [
        {
            "status": item["Status"],
            "from": _shown(item.get("StartTime")),
            "seconds": _seconds(item.get("StartTime"), item.get("EndTime")),
            "message": item.get("StatusMessage", ""),
        }
        for item in description.get("SecondaryStatusTransitions", [])
    ]
    if not rows:
        ends = [moment for _, moment in seen[1:]]
        rows = [
            {
                "status": status,
                "from": _shown(moment),
                "seconds": _seconds(moment, ends[index] if index < len(ends) else None),
                "message": "",
            }
            for index, (status, moment) in enumerate(seen)
        ]
    if not rows:
        return None
    columns = [
        dg.TableColumn("status", "string"),
        dg.TableColumn("from", "string"),
        dg.TableColumn("seconds", "float"),
        dg.TableColumn("message", "string"),
    ]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema=dg.TableSchema(columns))


def _shown(moment: object) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S") if isinstance(moment, datetime) else ""


def _seconds(start: object, end: object) -> float:
    if isinstance(start, datetime) and isinstance(end, datetime):
        return round((end - start).total_seconds(), 1)
    return 0.0
