"""Reports about a job: the log lines of its hosts, its status, its cost, and why it failed with the remedy."""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from resources.aws.calls import error_code, error_message, is_missing, is_transient, pages
from resources.sagemaker.jobs import TRAINING, TUNING, Job, JobKind, seconds_between
from resources.waiting import wait_until
from step_scripts.runner.wording import counted, number, rounded

_TAIL = 30
_LINES_PER_EVENT = 50
_HOST = re.compile(r"\balgo-\d+\b")
_EXIT_CODE = re.compile(r"exit code:? (\d+)")
_ERROR_LINE = re.compile(r"Traceback|Error\b|Exception\b|error:|failed", re.IGNORECASE)
_PERMANENT = ("AlgorithmError", "ClientError")
_LIMITS = ("ResourceLimitExceeded", "CapacityError", "InsufficientInstanceCapacity", "InternalServerError")
_REFUSED = ("AccessDeniedException", "AccessDenied", "UnrecognizedClientException", "ExpiredTokenException")


class JobLogs:
    """Forwards the lines of a job's hosts to `emit`, prefixed with `[algo-N]`; `tails` keeps each host's last 30.

    Polled, not streamed: each poll makes a bounded number of calls, and the next one goes on where it stopped. `client`
    should give up after a few attempts: the next poll tries again.
    """

    def __init__(self, client: Any, log_group: str, job_name: str, emit: Callable[[str], None]) -> None:
        self._client = client
        self._group = log_group
        self._job = job_name
        self._emit = emit
        self._read_to: dict[str, str | None] = {}  # by stream: CloudWatch's token
        self.tails: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=_TAIL))  # by host
        self._last_event: dict[str, int] = {}  # by host
        self._refused = False

    def poll(self, calls_per_stream: int = 2) -> bool | None:
        """Forward what has arrived. Whether there was anything; `None` if CloudWatch does not answer.

        An error that a later call will meet too (missing permissions) is reported once and ends the forwarding. None is
        raised: a job does not end because of its log.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        found = False
        try:
            for stream in [] if self._refused else self._streams():
                for _ in range(calls_per_stream):
                    if not self._read(stream):
                        break
                    found = True
        except (ClientError, BotoCoreError) as error:
            if is_transient(error):
                return None
            self._refused = True
            self._emit(f"The job's log lines cannot be read: {error}")
        return found

    def drain(self, seconds: float, *, quiet_seconds: float, expect_lines: bool = True) -> bool:
        """Read to the end of all streams, for at most `seconds`; whether that succeeded.

        CloudWatch gets lines a moment after they were written, so the end is reached when there has been nothing new
        for `quiet_seconds`. With `expect_lines`, a job without streams has not reached it.
        """
        quiet_since = time.monotonic()

        def ended() -> bool:
            nonlocal quiet_since
            if self.poll(calls_per_stream=1_000_000) is not False or (expect_lines and not self._read_to):
                quiet_since = time.monotonic()
            return self._refused or time.monotonic() - quiet_since >= quiet_seconds

        try:
            return wait_until(ended, timeout=seconds, interval=min(0.5, quiet_seconds / 4), what="the end of the log")
        except TimeoutError:
            return False

    def hosts(self) -> list[str]:
        """Hosts that have written something, in the order of their last line: one that failed writes nothing after."""
        return sorted(self._last_event, key=lambda host: (self._last_event[host], host))

    def _streams(self) -> list[str]:
        """Names of all streams: one a host and start of its container."""
        from botocore.exceptions import ClientError

        names = {"logGroupName": self._group, "logStreamNamePrefix": f"{self._job}/"}
        try:
            for item in pages(self._client, "describe_log_streams", "logStreams", **names):
                self._read_to.setdefault(item["logStreamName"], None)
        except ClientError as error:
            if not is_missing(error):  # the group appears with the account's first job
                raise
        return list(self._read_to)

    def _read(self, stream: str) -> bool:
        """Forward the next lines of a stream; whether there were any."""
        token = self._read_to[stream]
        answer = self._client.get_log_events(
            logGroupName=self._group,
            logStreamName=stream,
            startFromHead=True,
            **({"nextToken": token} if token else {}),
        )
        self._read_to[stream] = answer.get("nextForwardToken", token)
        events = answer["events"]
        if not events:
            return False
        host = stream.partition("/")[2].rpartition("-")[0] or stream
        self._last_event[host] = events[-1]["timestamp"]
        lines = [line for event in events for line in event["message"].splitlines() or [""]]
        self.tails[host].extend(lines)
        for start in range(0, len(lines), _LINES_PER_EVENT):
            block = lines[start : start + _LINES_PER_EVENT]
            self._emit("\n".join(f"[{host}] {line}" for line in block))
        return True


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


def status_lines(job: Job) -> list[str]:
    """What is to be said of a job: each of its secondary statuses with SageMaker's message, or the status alone."""
    if job.kind is TUNING:
        return [_progress(job)]
    lines = []
    for item in job.facts.get("SecondaryStatusTransitions", []):
        message = item.get("StatusMessage", "")
        lines.append(f"SageMaker: {item['Status']}" + (f": {message}" if message else ""))
    return lines or [f"SageMaker: {job.status}"]


def _progress(job: Job) -> str:
    counters = job.facts.get("TrainingJobStatusCounters", {})
    failed = counters.get("NonRetryableError", 0)
    done = counters.get("Completed", 0) + counters.get("Stopped", 0) + failed
    most = job.facts["HyperParameterTuningJobConfig"]["ResourceLimits"].get("MaxNumberOfTrainingJobs")
    text = f"{job}: {job.status}, {done} of {counted(most, 'trial')} finished"
    if failed:
        text += f", {failed} of them failed"
    metric = job.facts.get("BestTrainingJob", {}).get("FinalHyperParameterTuningJobObjectiveMetric")
    return text + (f", best so far {metric['MetricName']} {number(metric['Value'])}" if metric else "")


def _status_history(job: Job) -> dg.TableMetadataValue:
    """SageMaker's own transitions where it gives them (training), else what the times of an ended job say."""
    started, ended = job.facts.get(job.kind.started), job.facts.get(job.kind.ended)
    in_progress = {"Status": "InProgress", "StartTime": started, "EndTime": ended}
    items = job.facts.get("SecondaryStatusTransitions") or [in_progress, {"Status": job.status, "StartTime": ended}]
    rows = [
        {
            "status": item["Status"],
            "from": item["StartTime"].strftime("%Y-%m-%d %H:%M:%S") if item.get("StartTime") else "",
            "seconds": seconds_between(item.get("StartTime"), item.get("EndTime")) or 0.0,
            "message": item.get("StatusMessage", ""),
        }
        for item in items
    ]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in rows])


def job_metadata(job: Job, price_per_hour: float | None) -> dict[str, Any]:
    """Name, links, instances, durations, billable seconds, spot savings, estimated cost, status history.

    `price_per_hour` is one instance's; the estimate multiplies it by the billable time of all instances.
    """
    instances, running = job.instances(), job.running_seconds()
    count = sum(number for _, number in instances)
    billable = job.facts.get("BillableTimeInSeconds") if job.kind is TRAINING else running
    trained = job.facts.get("TrainingTimeInSeconds")
    cost = savings = None
    if billable is not None and price_per_hour is not None:
        cost = rounded(price_per_hour * count * billable / 3600)
    if billable is not None and trained and job.facts.get("EnableManagedSpotTraining"):
        savings = round(100 * (1 - billable / trained), 1)
    metadata = {
        "sagemaker_job": job.name,
        "sagemaker_job_arn": job.arn,
        **{what: dg.MetadataValue.url(url) for what, url in job.links().items()},
        "job_status": job.status,
        "instance_type": ", ".join(dict.fromkeys(instance for instance, _ in instances)),
        "instance_count": count,
        "job_seconds": seconds_between(job.facts.get("CreationTime"), job.facts.get(job.kind.ended)),
        "running_seconds": running,
        "billable_seconds": None if billable is None else float(billable),
        "estimated_cost": cost,
        "spot_savings_percent": savings,
        "status_history": _status_history(job),
    }
    return {key: value for key, value in metadata.items() if value is not None}


def start_failure(kind: JobKind, name: str, error: Exception) -> JobFailure:
    """The failure for a create request that SageMaker refused."""
    code = error_code(error)
    remedy = "correct the request"
    if code in _LIMITS:
        remedy = "wait for other jobs to end, request a higher quota in Service Quotas, or use another instance type"
    elif code in _REFUSED:
        remedy = "check the credentials and their policy (iam:PassRole on the job's role included)"
    text = f"SageMaker did not start {kind.noun} {name}: {code or type(error).__name__}: {error_message(error)}"
    return JobFailure(f"{text}\nWhat to do: {remedy}.", {}, allow_retries=code in _LIMITS, job_name=name)


def job_failure(
    job: Job, logs: JobLogs, metadata: Mapping[str, Any], *, why: str = "", messages: Sequence[Any] = ()
) -> JobFailure:
    """The failure for a job that has ended. `why` says what was wrong with a job that SageMaker calls Completed."""
    secondary = job.facts.get("SecondaryStatus", job.status)
    given = [job.facts.get("FailureReason"), job.facts.get("ExitMessage")]  # processing: the script's own words
    reason = why or "; ".join(text for text in given if text) or "no reason was given"
    may_pass, remedy = _verdict(job.status, secondary, reason, why)
    host = failing_host(reason, logs)
    shown = job.status if secondary == job.status else f"{job.status} ({secondary})"
    parts = [f"{job} ended as {shown}: {reason}"]
    if host and (tail := logs.tails[host]):
        parts.append(f"Last {len(tail)} log lines of {host}:\n" + "\n".join(f"  {line}" for line in tail))
    parts.append(f"What to do: {remedy}.")
    words = {"console": "Job", "logs": "Logs"}
    parts += [f"{words[what]}: {url}" for what, url in job.links().items()]
    return JobFailure(
        "\n".join(parts),
        {**metadata, "failure_reason": reason, **({"failing_host": host} if host else {})},
        allow_retries=may_pass,
        job_name=job.name,
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
        if any(_ERROR_LINE.search(line) for line in logs.tails[host]):
            return host
    return hosts[0] if hosts else None


def _verdict(status: str, secondary: str, reason: str, why: str) -> tuple[bool, str]:
    """Whether the same job may succeed later, and what to do."""
    if secondary == "MaxRuntimeExceeded" or "longer than MaxRuntimeInSeconds" in reason:
        return False, "raise max_run_seconds, or use more or larger instances"
    if secondary == "MaxWaitTimeExceeded":
        return True, "raise max_wait_seconds, choose another instance type, or set use_spot to false"
    if status == "Stopped":
        return False, "somebody stopped the job, or it ran out of time; start the run again if that was wrong"
    if why:
        return False, "see the log; the script must use open_dagster_pipes as a context manager and let it end"
    if reason.startswith(_LIMITS) or "capacity" in reason.lower():
        return True, "try again later, or use another instance type or zone"
    if (code := _EXIT_CODE.search(reason)) and code[1] in ("137", "9"):
        return False, "the host probably ran out of memory: use a larger instance or more instances"
    if reason.startswith("ClientError"):
        return False, "check the inputs on S3, the image and the permissions of the job's role"
    return not reason.startswith(_PERMANENT), "mend the script or its input; see the log lines above"
