"""Reports about a job: its status while it runs, its cost, and why it failed with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from resources.aws.calls import error_code, error_message
from resources.sagemaker.job_kinds import TRAINING, JobKind
from resources.sagemaker.job_logs import JobLogs
from step_scripts.runner.wording import rounded

_HOST = re.compile(r"\balgo-\d+\b")
_EXIT_CODE = re.compile(r"exit code:? (\d+)")
_ERROR_LINE = re.compile(r"Traceback|Error\b|Exception\b|error:|failed", re.IGNORECASE)
_PERMANENT = ("AlgorithmError", "ClientError")
_LIMITS = ("ResourceLimitExceeded", "CapacityError", "InsufficientInstanceCapacity", "InternalServerError")
_REFUSED = ("AccessDeniedException", "AccessDenied", "UnrecognizedClientException", "ExpiredTokenException")


class JobFailure(dg.Failure):
    """A job that did not start, or did not end well.

    `reason` is SageMaker's, or what was wrong with a job that SageMaker calls Completed. `messages` are the custom
    messages that the job has sent.
    """

    def __init__(
        self,
        description: str,
        metadata: Mapping[str, Any],
        *,
        allow_retries: bool,
        job_name: str,
        reason: str = "",
        messages: Sequence[Any] = (),
    ) -> None:
        super().__init__(description, metadata, allow_retries)
        self.job_name = job_name
        self.reason = reason
        self.messages = list(messages)


class StatusLog:
    """Says each status and secondary status of a job once, with SageMaker's message, and keeps when it was seen."""

    def __init__(self, kind: JobKind, say: Callable[[str], None]) -> None:
        self._kind = kind
        self._say = say
        self._transitions = 0
        self._seen: list[dict[str, Any]] = []

    def see(self, description: Mapping[str, Any]) -> None:
        """Say what is new in a description."""
        transitions = description.get("SecondaryStatusTransitions", [])
        for item in transitions[self._transitions :]:
            message = item.get("StatusMessage", "")
            self._say(f"SageMaker: {item['Status']}" + (f": {message}" if message else ""))
        self._transitions = len(transitions)
        status = description[self._kind.status_member]
        if not self._seen or self._seen[-1]["Status"] != status:
            now = datetime.now(UTC)
            if self._seen:
                self._seen[-1]["EndTime"] = now
            self._seen.append({"Status": status, "StartTime": now})
            if not transitions:
                self._say(f"SageMaker: {status}")

    def table(self, description: Mapping[str, Any]) -> dg.TableMetadataValue | None:
        """SageMaker's own transitions where it gives them (training), else those that were seen."""
        rows = [
            {
                "status": item["Status"],
                "from": item["StartTime"].strftime("%Y-%m-%d %H:%M:%S") if "StartTime" in item else "",
                "seconds": _seconds(item.get("StartTime"), item.get("EndTime")) or 0.0,
                "message": item.get("StatusMessage", ""),
            }
            for item in description.get("SecondaryStatusTransitions") or self._seen
        ]
        types = {"status": "string", "from": "string", "seconds": "float", "message": "string"}
        schema = dg.TableSchema([dg.TableColumn(name, kind) for name, kind in types.items()])
        return dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema=schema) if rows else None


def job_metadata(
    kind: JobKind, name: str, description: Mapping[str, Any], price_per_hour: float | None, statuses: StatusLog
) -> dict[str, Any]:
    """Name, links, instances, durations, billable seconds, spot savings, estimated cost, status history.

    `price_per_hour` is one instance's; the estimate multiplies it by the billable time of all instances.
    """
    arn = description[kind.arn_member]
    instances = kind.instances(description)
    count = sum(number for _, number in instances)
    running = kind.running_seconds(description)
    billable = description.get("BillableTimeInSeconds") if kind is TRAINING else running
    trained = description.get("TrainingTimeInSeconds")
    cost = savings = None
    if billable is not None and price_per_hour is not None:
        cost = rounded(price_per_hour * count * float(billable) / 3600)
    if billable is not None and trained and description.get("EnableManagedSpotTraining"):
        savings = round(100 * (1 - float(billable) / trained), 1)
    metadata = {
        "sagemaker_job": name,
        "sagemaker_job_arn": arn,
        **{what: dg.MetadataValue.url(url) for what, url in kind.links(arn, name).items()},
        "job_status": description[kind.status_member],
        "instance_type": ", ".join(dict.fromkeys(instance for instance, _ in instances)),
        "instance_count": count,
        "job_seconds": _seconds(description.get("CreationTime"), description.get(kind.ended)),
        "running_seconds": None if running is None else round(running, 1),
        "billable_seconds": None if billable is None else round(float(billable), 1),
        "estimated_cost": cost,
        "spot_savings_percent": savings,
        "status_history": statuses.table(description),
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _seconds(start: object, end: object) -> float | None:
    if isinstance(start, datetime) and isinstance(end, datetime):
        return round((end - start).total_seconds(), 1)
    return None


@dataclass(frozen=True)
class _Verdict:
    permanent: bool
    remedy: str


def start_failure(kind: JobKind, name: str, error: Exception) -> JobFailure:
    """The failure for a create request that SageMaker refused."""
    code = error_code(error)
    if code in _LIMITS:
        verdict = _Verdict(
            False, "wait for other jobs to end, request a higher quota in Service Quotas, or use another instance type"
        )
    elif code in _REFUSED:
        verdict = _Verdict(True, "check the credentials and their policy (iam:PassRole on the job's role included)")
    else:
        verdict = _Verdict(True, "correct the request")
    text = f"SageMaker did not start {kind.noun} {name}: {code or type(error).__name__}: {error_message(error)}"
    return JobFailure(f"{text}\nWhat to do: {verdict.remedy}.", {}, allow_retries=not verdict.permanent, job_name=name)


def job_failure(
    kind: JobKind,
    name: str,
    description: Mapping[str, Any],
    logs: JobLogs,
    metadata: Mapping[str, Any],
    *,
    why: str = "",
    messages: Sequence[Any] = (),
) -> JobFailure:
    """The failure for a job that has ended. `why` says what was wrong with a job that SageMaker calls Completed."""
    status = description[kind.status_member]
    secondary = description.get("SecondaryStatus", status)
    given = [description.get("FailureReason"), description.get("ExitMessage")]  # processing: the script's own words
    reason = why or "; ".join(text for text in given if text) or "no reason was given"
    verdict = _verdict(status, secondary, reason, why)
    host = failing_host(reason, logs)
    shown = status if secondary == status else f"{status} ({secondary})"
    parts = [f"{kind.noun} {name} ended as {shown}: {reason}"]
    if host and (tail := logs.tail(host)):
        parts.append(f"Last {len(tail)} log lines of {host}:\n" + "\n".join(f"  {line}" for line in tail))
    parts.append(f"What to do: {verdict.remedy}.")
    words = {"console": "Job", "logs": "Logs"}
    parts += [f"{words[what]}: {url}" for what, url in kind.links(description[kind.arn_member], name).items()]
    return JobFailure(
        "\n".join(parts),
        {**metadata, "failure_reason": reason, **({"failing_host": host} if host else {})},
        allow_retries=not verdict.permanent,
        job_name=name,
        reason=reason,
        messages=messages,
    )


def failing_host(reason: str, logs: JobLogs) -> str | None:
    """The host that most probably failed: the one the reason names, else one whose last lines speak of an error.

    SageMaker does not say. Of several candidates it is the one that fell silent first.
    """
    hosts = logs.hosts()
    if (named := _HOST.search(reason)) and named[0] in hosts:
        return named[0]
    for host in hosts:
        if any(_ERROR_LINE.search(line) for line in logs.tail(host)):
            return host
    return hosts[0] if hosts else None


def _verdict(status: str, secondary: str, reason: str, why: str) -> _Verdict:
    if secondary == "MaxRuntimeExceeded" or "longer than MaxRuntimeInSeconds" in reason:
        return _Verdict(True, "raise max_run_seconds, or use more or larger instances")
    if secondary == "MaxWaitTimeExceeded":
        return _Verdict(False, "raise max_wait_seconds, choose another instance type, or set use_spot to false")
    if status == "Stopped":
        return _Verdict(True, "somebody stopped the job, or it ran out of time; start the run again if that was wrong")
    if why:
        return _Verdict(True, "see the log; the script must use open_dagster_pipes as a context manager and let it end")
    if reason.startswith(_LIMITS) or "capacity" in reason.lower():
        return _Verdict(False, "try again later, or use another instance type or zone")
    if (code := _EXIT_CODE.search(reason)) and code[1] in ("137", "9"):
        return _Verdict(True, "the host probably ran out of memory: use a larger instance or more instances")
    if reason.startswith("ClientError"):
        return _Verdict(True, "check the inputs on S3, the image and the permissions of the job's role")
    return _Verdict(reason.startswith(_PERMANENT), "mend the script or its input; see the log lines above")
