"""What differs between the kinds of jobs in the API: names of operations, members, places."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit

from resources.aws.calls import if_found

TERMINAL = ("Completed", "Failed", "Stopped")
_CONSOLES = {"aws-cn": "console.amazonaws.cn", "aws-us-gov": "console.amazonaws-us-gov.com"}


@dataclass(frozen=True)
class JobKind:
    """One kind of job: `noun` for people, and how the API spells it."""

    noun: str
    operation: str
    console_path: str
    started: str
    ended: str
    logged_as: str = ""

    @property
    def name_member(self) -> str:
        """`TrainingJobName` or `ProcessingJobName`."""
        return f"{self.operation}Name"

    @property
    def arn_member(self) -> str:
        """`TrainingJobArn` or `ProcessingJobArn`."""
        return f"{self.operation}Arn"

    @property
    def status_member(self) -> str:
        """`TrainingJobStatus` or `ProcessingJobStatus`."""
        return f"{self.operation}Status"

    @property
    def create_operation(self) -> str:
        """Name of the operation in the service model."""
        return f"Create{self.operation}"

    @property
    def log_group(self) -> str:
        """CloudWatch log group of all jobs of this kind; for tuning jobs, that of their training jobs."""
        return f"/aws/sagemaker/{self.logged_as or self.operation}s"

    @property
    def resource(self) -> str:
        """How ARNs name the kind: `training-job`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", self.operation).lower()

    @property
    def list_operation(self) -> str:
        """The client's method that lists jobs; `summaries_member` of its answer holds them."""
        return f"list_{self.resource.replace('-', '_')}s"

    @property
    def summaries_member(self) -> str:
        """`TrainingJobSummaries` or `ProcessingJobSummaries`."""
        return f"{self.operation}Summaries"

    def method(self, client: Any, verb: str) -> Any:
        """The client's method for `create`, `describe` or `stop`."""
        return getattr(client, f"{verb}_{self.resource.replace('-', '_')}")

    def describe(self, client: Any, name: str) -> dict[str, Any] | None:
        """The job's description; `None` if there is no such job."""
        return if_found(self.method(client, "describe"), **{self.name_member: name})

    def links(self, arn: str, name: str) -> dict[str, str]:
        """The job's pages in the AWS console, `console` and `logs`; none where boto3 is sent elsewhere than to AWS."""
        if not has_console():
            return {}
        return {"console": self.console_url(arn, name), "logs": self.log_url(arn, name)}

    def started_text(self, arn: str, name: str) -> str:
        """The message that the job was created, with its page if there is one."""
        return ": ".join([f"Started {self.noun} {name}", *list(self.links(arn, name).values())[:1]])

    def console_url(self, arn: str, name: str) -> str:
        """The job's page in the AWS console."""
        host, region = _console(arn)
        return f"https://{region}.{host}/sagemaker/home?region={region}#/{self.console_path}/{name}"

    def log_url(self, arn: str, name: str) -> str:
        """The job's log streams in the CloudWatch console."""
        host, region = _console(arn)
        group = quote(quote(self.log_group, safe=""), safe="").replace("%", "$")
        streams = quote(quote(f"?logStreamNameFilter={name}/", safe=""), safe="").replace("%", "$")
        streams = streams.replace("$253F", "$3F").replace("$253D", "$3D")
        return f"https://{region}.{host}/cloudwatch/home?region={region}#logsV2:log-groups/log-group/{group}{streams}"

    def instances(self, description: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Instance types and their counts; several only in heterogeneous training."""
        if self is TUNING:
            config = description["TrainingJobDefinition"].get("ResourceConfig", {})
        elif self is PROCESSING:
            config = description["ProcessingResources"]["ClusterConfig"]
        else:
            config = description.get("ResourceConfig", {})
        if groups := config.get("InstanceGroups"):
            return [(group["InstanceType"], group["InstanceCount"]) for group in groups]
        return [(config.get("InstanceType", "unknown"), config.get("InstanceCount", 1))]

    def running_seconds(self, description: Mapping[str, Any]) -> float | None:
        """Seconds from the start of the container to its end; `None` if it never started."""
        start, end = description.get(self.started), description.get(self.ended)
        if not isinstance(start, datetime) or not isinstance(end, datetime):
            return None
        return max(0.0, (end - start).total_seconds())


def has_console() -> bool:
    """Whether AWS's console shows the jobs. It shows none of an emulator, to which these variables direct boto3."""
    given = os.environ.get("AWS_ENDPOINT_URL_SAGEMAKER") or os.environ.get("AWS_ENDPOINT_URL") or ""
    host = urlsplit(given).hostname or "amazonaws.com"
    return host.endswith(("amazonaws.com", "amazonaws.com.cn"))


def _console(arn: str) -> tuple[str, str]:
    _, partition, _, region, *_ = arn.split(":")
    return _CONSOLES.get(partition, "console.aws.amazon.com"), region


TRAINING = JobKind("training job", "TrainingJob", "jobs", "TrainingStartTime", "TrainingEndTime")
PROCESSING = JobKind("processing job", "ProcessingJob", "processing-jobs", "ProcessingStartTime", "ProcessingEndTime")
TUNING = JobKind(
    "tuning job",
    "HyperParameterTuningJob",
    "hyper-tuning-jobs",
    "CreationTime",
    "HyperParameterTuningEndTime",
    "TrainingJob",
)
