"""Why a job failed, in one message that says what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg

from resources.aws.calls import error_code, error_message
from resources.sagemaker.job_kinds import JobKind

if TYPE_CHECKING:
    from resources.sagemaker.job_logs import JobLogs

_HOST = re.compile(r"\balgo-\d+\b")
_EXIT_CODE = re.compile(r"exit code:? (\d+)")
_ERROR_LINE = re.compile(r"Traceback|Error\b|Exception\b|error:|failed", re.IGNORECASE)
_PERMANENT = ("AlgorithmError", "ClientError")
_LIMITS = ("ResourceLimitExceeded", "CapacityError", "InsufficientInstanceCapacity", "InternalServerError")


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
    elif code in ("AccessDeniedException", "AccessDenied", "UnrecognizedClientException", "ExpiredTokenException"):
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
    arn = description[kind.arn_member]
    words = {"console": "Job", "logs": "Logs"}
    parts += [f"{words[what]}: {url}" for what, url in kind.links(arn, name).items()]
    details = {**metadata, "failure_reason": reason}
    if host:
        details["failing_host"] = host
    return JobFailure(
        "\n".join(parts),
        details,
        allow_retries=not verdict.permanent,
        job_name=name,
        reason=reason,
        messages=messages,
    )


def failing_host(reason: str, logs: JobLogs) -> str | None:
    """The host that most probably failed: the one the reason names, else one whose last lines speak of an error.

    SageMaker does not say. Of several candidates it is the one that fell silent first.
    """
    if (named := _HOST.search(reason)) and named[0] in logs.hosts():
        return named[0]
    order = logs.silent_first()
    for host in order:
        if any(_ERROR_LINE.search(line) for line in logs.tail(host)):
            return host
    return order[0] if order else None


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
