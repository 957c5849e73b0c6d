"""Jobs as SageMaker knows them: how the API spells their kinds, their names, how they are found and stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

import dagster as dg

from resources.aws.calls import error_message, if_found, is_missing
from resources.aws.ownership import RUN_TAG, belongs_to, created_here, tags_of
from resources.inventory import NotOwned, OwnedItem
from resources.sagemaker.job_files import LEASE, JobSettings
from resources.waiting import wait_until

TERMINAL = ("Completed", "Failed", "Stopped")
_CONSOLES = {"aws-cn": "console.amazonaws.cn", "aws-us-gov": "console.amazonaws-us-gov.com"}
_NAME_LENGTH = 63
_SUFFIX = 5  # room for `-9999`
_DIGEST = 10
_APPEARANCE_SECONDS = 2.0
_LEASE_SECONDS = 120.0  # several intervals of renewal
_STOP_SECONDS = 300.0


@dataclass(frozen=True)
class JobKind:
    """One kind of job: `noun` for people, and how console and API spell it; `started`, `ended`: members with times."""

    noun: str
    operation: str
    console_path: str
    started: str
    ended: str

    @property
    def method_name(self) -> str:
        """As in the names of the client's methods: `training_job`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.operation).lower()

    @property
    def log_group(self) -> str:
        """That of all jobs of the kind; of tuning jobs, that of their training jobs."""
        return "/aws/sagemaker/ProcessingJobs" if self.operation == "ProcessingJob" else "/aws/sagemaker/TrainingJobs"

    def member(self, what: str) -> str:
        """Name of a member of requests and answers: `TrainingJobName` for `Name`, `ProcessingJobArn` for `Arn`."""
        return f"{self.operation}{what}"

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
        """The job's pages in the AWS console, `console` and `logs`; none where boto3 is sent elsewhere than to AWS."""
        if not _has_console():
            return {}
        _, partition, _, region, *_ = self.arn.split(":")
        console = f"https://{region}.{_CONSOLES.get(partition, 'console.aws.amazon.com')}"
        texts = (self.kind.log_group, f"{self.name}/")
        group, streams = (quote(quote(text, safe=""), safe="").replace("%", "$") for text in texts)
        return {
            "console": f"{console}/sagemaker/home?region={region}#/{self.kind.console_path}/{self.name}",
            "logs": f"{console}/cloudwatch/home?region={region}#logsV2:log-groups/log-group/{group}"
            f"$3FlogStreamNameFilter$3D{streams}",
        }

    def started_text(self) -> str:
        """The message that the job was created, with its page if there is one."""
        return ": ".join([f"Started {self}", *list(self.links().values())[:1]])

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
    readable = re.sub(r"[^a-zA-Z0-9]+", "-", "-".join([prefix, *assets])).strip("-")
    room = _NAME_LENGTH - _SUFFIX - len(digests) - 1
    return "-".join(part for part in (readable[:room].rstrip("-"), digests) if part)


def attempts_of(name: str) -> Iterator[str]:
    """The names of the attempts: `name`, `name`-2, `name`-3 …"""
    return itertools.chain([name], (f"{name}-{number}" for number in range(2, 10_000)))


def request_digest(params: Mapping[str, Any]) -> str:
    """Digest of a create request without its name and tags."""
    ignored = {"Tags", *(kind.member("Name") for kind in (TRAINING, PROCESSING, TUNING))}
    return digest_of({key: value for key, value in params.items() if key not in ignored})


def digest_of(value: object) -> str:
    """SHA-256 of the value's canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


TRAINING = JobKind("training job", "TrainingJob", "jobs", "TrainingStartTime", "TrainingEndTime")
PROCESSING = JobKind("processing job", "ProcessingJob", "processing-jobs", "ProcessingStartTime", "ProcessingEndTime")
TUNING = JobKind(
    "tuning job", "HyperParameterTuningJob", "hyper-tuning-jobs", "CreationTime", "HyperParameterTuningEndTime"
)


def stop_job(kind: JobKind, client: Any, name: str, log: dg.DagsterLogManager | logging.Logger, seconds: float) -> None:
    """Stop the job and wait until it is `Stopping` or has ended, for at most `seconds`.

    Never raises an AWS error: this runs while another error is on its way. A job that does not exist is waited for a
    moment, because an interrupted create request may still take effect.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    log.warning(f"Stopping {kind.noun} {name}")
    which = {kind.member("Name"): name}
    start = time.monotonic()

    def stopping() -> bool:
        try:
            job = kind.job(kind.method(client, "describe")(**which))
            if job.status in (*TERMINAL, "Stopping"):
                log.warning(f"{job} is {job.status}")
                return True
            kind.method(client, "stop")(**which)
        except (ClientError, BotoCoreError) as error:
            if is_missing(error):
                return time.monotonic() - start > _APPEARANCE_SECONDS
            log.error(f"{kind.noun} {name}: {error_message(error)}; trying again to stop it")
        return False

    try:
        wait_until(stopping, timeout=seconds, interval=0.25, what=f"the end of {name}")
    except TimeoutError:
        log.error(f"{kind.noun} {name} could not be stopped; stop it by hand: it costs money until then")


def jobs_in_progress(settings: JobSettings) -> Iterator[OwnedItem]:
    """Those with the tag of the settings' `job_root`. Tuning jobs first, because their training jobs end with them."""
    client = settings.client("sagemaker")
    for kind in (TUNING, TRAINING, PROCESSING):
        name, arn = kind.member("Name"), kind.member("Arn")
        listing = (f"list_{kind.method_name}s", kind.member("Summaries"), arn)
        for found, tags in created_here(client, *listing, settings.job_root, StatusEquals="InProgress"):
            holder = _lease_holder(settings, found[name])
            yield OwnedItem(
                kind="job",
                name=found[name],
                location=found[arn],
                created_at=found["CreationTime"],
                run_id=tags.get(RUN_TAG),
                temporary=holder is None,
                detail=f"{kind.noun} in progress, lease held by {holder or 'nobody'}",
            )


def remove_job(settings: JobSettings, item: OwnedItem) -> None:
    """Stop the job and wait for its end. Raises `NotOwned`; `TimeoutError` if it does not end."""
    client = settings.client("sagemaker")
    kind = next(k for k in (TUNING, TRAINING, PROCESSING) if f":{k.method_name.replace('_', '-')}/" in item.location)
    if not belongs_to(tags_of(client, item.location), settings.job_root):
        raise NotOwned(f"{kind.noun} {item.name} was not started by this deployment; it is left alone")
    stop_job(kind, client, item.name, dg.get_dagster_logger(), 60.0)

    def ended() -> bool:
        job = kind.describe(client, item.name)
        return job is None or job.status in TERMINAL

    wait_until(ended, timeout=_STOP_SECONDS, interval=1.0, what=f"the end of {kind.noun} {item.name}")


def _lease_holder(settings: JobSettings, name: str) -> str | None:
    """The run that has renewed its lease on the job in the last two minutes."""
    found = settings.prefix(name).get(LEASE)
    if found is None:
        return None
    claim = json.loads(found[0])
    age = datetime.now(UTC) - datetime.fromisoformat(claim["renewed_at"])
    return f"run {claim['run_id']}" if age.total_seconds() < _LEASE_SECONDS else None
