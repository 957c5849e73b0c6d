"""The kinds of jobs as the API spells them, a job as SageMaker describes it, and the names of jobs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit

from resources.aws.calls import if_found

TERMINAL = ("Completed", "Failed", "Stopped")
_CONSOLES = {"aws-cn": "console.amazonaws.cn", "aws-us-gov": "console.amazonaws-us-gov.com"}
_NAME_LENGTH = 63
_SUFFIX = 5  # room for `-9999`
_DIGEST = 10


@dataclass(frozen=True)
class JobKind:
    """One kind of job: `noun` for people, and how the API spells it. `log_group`: that of all jobs of the kind."""

    noun: str
    operation: str
    method_name: str
    console_path: str
    started: str
    ended: str
    log_group: str

    def member(self, what: str) -> str:
        """Name of a member of requests and answers: `TrainingJobName` for `Name`, `ProcessingJobArn` for `Arn`."""
        return f"{self.operation}{what}"

    @property
    def create_operation(self) -> str:
        """Name of the operation in the service model."""
        return f"Create{self.operation}"

    def method(self, client: Any, verb: str) -> Any:
        """The client's method for `create`, `describe` or `stop`."""
        return getattr(client, f"{verb}_{self.method_name}")

    def job(self, description: Mapping[str, Any]) -> Job:
        """The job of a description."""
        name, arn, status = (description[self.member(what)] for what in ("Name", "Arn", "Status"))
        return Job(self, name, arn, status, description)

    def describe(self, client: Any, name: str) -> Job | None:
        """The job as it is now; `None` if there is no such job."""
        found = if_found(self.method(client, "describe"), **{self.member("Name"): name})
        return None if found is None else self.job(found)

    def links(self, arn: str, name: str) -> dict[str, str]:
        """The job's pages in the AWS console, `console` and `logs`; none where boto3 is sent elsewhere than to AWS."""
        if not _has_console():
            return {}
        _, partition, _, region, *_ = arn.split(":")
        console = f"https://{region}.{_CONSOLES.get(partition, 'console.aws.amazon.com')}"
        group, streams = (quote(quote(t, safe=""), safe="").replace("%", "$") for t in (self.log_group, f"{name}/"))
        return {
            "console": f"{console}/sagemaker/home?region={region}#/{self.console_path}/{name}",
            "logs": f"{console}/cloudwatch/home?region={region}#logsV2:log-groups/log-group/{group}"
            f"$3FlogStreamNameFilter$3D{streams}",
        }

    def started_text(self, arn: str, name: str) -> str:
        """The message that the job was created, with its page if there is one."""
        return ": ".join([f"Started {self.noun} {name}", *list(self.links(arn, name).values())[:1]])


@dataclass(frozen=True)
class Job:
    """A job as SageMaker describes it; `facts` is the whole description."""

    kind: JobKind
    name: str
    arn: str
    status: str
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.kind.noun} {self.name}"

    def links(self) -> dict[str, str]:
        """See `JobKind.links`."""
        return self.kind.links(self.arn, self.name)

    def instances(self) -> list[tuple[str, int]]:
        """Instance types and their counts; several only in heterogeneous training."""
        config = self.facts.get("ResourceConfig") or self.facts["ProcessingResources"]["ClusterConfig"]
        if groups := config.get("InstanceGroups"):
            return [(group["InstanceType"], group["InstanceCount"]) for group in groups]
        return [(config["InstanceType"], config["InstanceCount"])]

    def running_seconds(self) -> float | None:
        """Seconds from the start of the container to its end; `None` if it never started."""
        return seconds_between(self.facts.get(self.kind.started), self.facts.get(self.kind.ended))


def seconds_between(start: object, end: object) -> float | None:
    """Seconds between two times, to the tenth; `None` if one of them is not known."""
    if isinstance(start, datetime) and isinstance(end, datetime):
        return round((end - start).total_seconds(), 1)
    return None


def _has_console() -> bool:
    """Whether AWS's console shows the jobs. It shows none of an emulator, to which these variables direct boto3."""
    given = os.environ.get("AWS_ENDPOINT_URL_SAGEMAKER") or os.environ.get("AWS_ENDPOINT_URL") or ""
    host = urlsplit(given).hostname or "amazonaws.com"
    return host.endswith(("amazonaws.com", "amazonaws.com.cn"))


def job_name(prefix: str, assets: Sequence[str], work: str, root_run_id: str) -> str:
    """`<prefix>-<asset>-<digest of the work>-<digest of the root run>`, at most 58 characters of `[a-zA-Z0-9-]`.

    The readable part is cut if need be; the digests never are. Whether a job of that name does this work is decided
    by its tags, which hold the whole digest.
    """
    digests = f"{work[:_DIGEST]}-{digest_of(root_run_id)[:_DIGEST]}"
    readable = re.sub(r"[^a-zA-Z0-9]+", "-", "-".join([prefix, *sorted(assets)])).strip("-")
    room = _NAME_LENGTH - _SUFFIX - len(digests) - 1
    return "-".join(part for part in (readable[:room].rstrip("-"), digests) if part)


def work_digest(assets: Sequence[str], partition: str | None, request: str) -> str:
    """Digest of what a job is for; the same in every run that does it. `request`: the digest of the request."""
    return digest_of([sorted(assets), partition, request])


def attempts_of(name: str) -> Iterator[str]:
    """The names of the attempts: `name`, `name`-2, `name`-3 …"""
    return itertools.chain([name], (f"{name}-{number}" for number in range(2, 10_000)))


def work_of(name: str) -> str:
    """The part of a first attempt's name that all runs share."""
    return name.rpartition("-")[0]


def request_digest(params: Mapping[str, Any]) -> str:
    """Digest of a create request without its name and tags."""
    ignored = {"Tags", *(kind.member("Name") for kind in (TRAINING, PROCESSING, TUNING))}
    return digest_of({key: value for key, value in params.items() if key not in ignored})


def digest_of(value: object) -> str:
    """SHA-256 of the value's canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


TRAINING = JobKind(
    noun="training job",
    operation="TrainingJob",
    method_name="training_job",
    console_path="jobs",
    started="TrainingStartTime",
    ended="TrainingEndTime",
    log_group="/aws/sagemaker/TrainingJobs",
)
PROCESSING = JobKind(
    noun="processing job",
    operation="ProcessingJob",
    method_name="processing_job",
    console_path="processing-jobs",
    started="ProcessingStartTime",
    ended="ProcessingEndTime",
    log_group="/aws/sagemaker/ProcessingJobs",
)
TUNING = JobKind(
    noun="tuning job",
    operation="HyperParameterTuningJob",
    method_name="hyper_parameter_tuning_job",
    console_path="hyper-tuning-jobs",
    started="CreationTime",
    ended="HyperParameterTuningEndTime",
    log_group=TRAINING.log_group,
)
