"""The small files of a job on S3: Pipes context and messages, what the caller adds, the lease. Settings of all jobs.

The lease is renewed while a Dagster process waits for the job. So the next run can tell a job whose process was killed,
which it takes over, from one that another run still waits for.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from resources.aws.calls import aws_client, error_code, if_found
from resources.waiting import wait_until
from step_scripts.runner.storage import split_uri

CONTEXT = "context.json"
BOOTSTRAP = "pipes.json"
MESSAGES = "messages"
LEASE = "lease.json"
SHORT_RETRY_SECONDS = 3.0  # where the same call will be made again soon


@dataclass(frozen=True)
class JobInputs:
    """What a job needs beside its request.

    `files` and `secrets` (name → content) are put below the job's prefix before it starts; secrets are removed when
    it has ended. `uri_variable` and `name_variable` name environment variables that tell the job its prefix and its
    name. With `uri_variable` the Pipes bootstrap parameters go into `pipes.json` below the prefix instead of the
    environment, whose values are short on SageMaker (256 characters in processing jobs). `digest` identifies the
    work; without it, it is a digest of the request.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    secrets: Mapping[str, bytes] = field(default_factory=dict)
    uri_variable: str | None = None
    name_variable: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class JobPrefix:
    """`<job root>/<job name>/` on S3, and the calls on the objects below it."""

    client: Any
    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """The prefix as a URI that ends with a slash."""
        return f"s3://{self.bucket}/{self.key}/"

    def path(self, name: str) -> str:
        """Key of the object `name`."""
        return f"{self.key}/{name}"

    def put(self, name: str, data: bytes, **params: Any) -> None:
        """Write an object."""
        self.client.put_object(Bucket=self.bucket, Key=self.path(name), Body=data, **params)

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and entity tag of an object; `None` if there is none."""
        answer = if_found(self.client.get_object, Bucket=self.bucket, Key=self.path(name))
        return None if answer is None else (answer["Body"].read(), str(answer["ETag"]))

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        self.client.delete_object(Bucket=self.bucket, Key=self.path(name))

    def message_chunks(self, first: int = 1) -> Iterator[list[dict[str, Any]]]:
        """The Pipes messages that have been written, by chunk, from chunk `first` on."""
        for chunk in itertools.count(first):
            if (found := self.get(f"{MESSAGES}/{chunk}.json")) is None:
                return
            yield [json.loads(line) for line in found[0].splitlines()]

    def has_closed(self) -> bool:
        """Whether the job's messages end with a `closed` that reports no exception."""
        messages = itertools.chain.from_iterable(self.message_chunks())
        closed = [message.get("params") or {} for message in messages if message.get("method") == "closed"]
        return bool(closed) and "exception" not in closed[-1]


@dataclass(frozen=True)
class JobPolling:
    """How often to ask, and how long to wait. Seconds.

    `interval` grows to `longest_interval` while a job runs. `retry` bounds how long throttled or unanswered calls are
    repeated. `drain` bounds the wait for the last messages and log lines after a job's end; the log is complete when
    nothing new came for `quiet`. `stop` bounds the wait for a job that was asked to stop. `lease`: interval between
    renewals.
    """

    interval: float = 2.0
    longest_interval: float = 10.0
    retry: float = 900.0
    drain: float = 20.0
    quiet: float = 3.0
    stop: float = 30.0
    lease: float = 15.0


@dataclass(frozen=True)
class JobSettings:
    """What all jobs of a deployment share.

    `job_root`: `s3://bucket/prefix` for context, messages and inputs of jobs. `name_prefix`: first part of their names.
    `detach`: leave a running job alone when the Dagster process is interrupted or fails. `forward_logs`: forward the
    log lines of all hosts to the run's log. `price_per_hour`: of one instance, for the estimate of costs.
    """

    job_root: str
    region_name: str | None = None
    name_prefix: str = "dagster"
    detach: bool = False
    forward_logs: bool = True
    price_per_hour: float | None = None
    polling: JobPolling = field(default_factory=JobPolling)

    def client(self, service: str, retry_seconds: float | None = None) -> Any:
        """The boto3 client of a service."""
        return aws_client(service, self.region_name, retry_seconds=retry_seconds or self.polling.retry)

    def prefix(self, name: str, retry_seconds: float | None = None) -> JobPrefix:
        """The S3 prefix of a job's small files."""
        bucket, root = split_uri(self.job_root)
        key = "/".join(part for part in (root.strip("/"), name) if part)
        return JobPrefix(self.client("s3", retry_seconds), bucket, key)


class JobLease:
    """A run's claim on one job; deleting the object gives it up. Renewed every `interval_seconds`."""

    def __init__(self, prefix: JobPrefix, run_id: str, *, interval_seconds: float = 15.0) -> None:
        self._prefix = prefix
        self._run_id = run_id
        self._interval = interval_seconds
        self._next = 0.0

    def take(self) -> None:
        """Claim the job, whoever held it."""
        self._prefix.put(LEASE, self._content())
        self._next = time.monotonic() + self._interval

    def renew(self) -> None:
        """Claim it again if it is time. Errors are ignored: the next call tries again."""
        from botocore.exceptions import BotoCoreError, ClientError

        if time.monotonic() >= self._next:
            with suppress(ClientError, BotoCoreError):
                self.take()

    def adopt(self) -> bool:
        """Take the claim over if its holder lets two intervals pass without renewing it. Waits for that.

        Of two processes that try at once one succeeds.
        """
        from botocore.exceptions import ClientError

        found = self._prefix.get(LEASE)
        if found is None:
            return False  # ended in order, or was left running on purpose
        tag = found[1]
        with suppress(TimeoutError):
            wait_until(
                lambda: (self._prefix.get(LEASE) or (b"", ""))[1] != tag,
                timeout=2 * self._interval,
                interval=min(1.0, self._interval / 4),
                what=f"a renewal of {self._prefix.uri}{LEASE}",
            )
            return False
        try:
            self._prefix.put(LEASE, self._content(), IfMatch=tag)
        except ClientError as error:
            if error_code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "NoSuchKey"):
                return False
            raise
        return True

    def _content(self) -> bytes:
        return json.dumps({"run_id": self._run_id, "renewed_at": datetime.now(UTC).isoformat()}).encode()
