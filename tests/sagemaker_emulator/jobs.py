"""What training and processing jobs have in common: identity, status, time, stopping."""

import itertools
import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from tests.sagemaker_emulator.cluster import Cluster, HostPlan
from tests.sagemaker_emulator.common import Call, Params, now
from tests.sagemaker_emulator.errors import ApiError, validation
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.storage import InputError

log = logging.getLogger(__name__)
_attempts = itertools.count(1)

TERMINAL = ("Completed", "Failed", "Stopped")


class Job(ABC):
    """A job that runs in a thread of its own."""

    kind: str
    log_group: str

    def __init__(self, services: Services, call: Call, name: str, arn: str) -> None:
        self.services = services
        self.request: Params = call.params
        self.region = call.region
        self.role: str | None = call.params.get("RoleArn")
        self.name = name
        self.arn = arn
        self.status = "InProgress"
        self.failure_reason: str | None = None
        self.created = self.modified = now()
        self.started: float | None = None
        self.ended: float | None = None
        self.stop_requested = threading.Event()
        self.finished = threading.Event()
        self.lock = threading.RLock()
        self.cluster: Cluster | None = None
        services.tag(arn, call.params.get("Tags"))

    def launch(self) -> None:
        """Start the job's thread."""
        self.services.spawn(f"{self.kind}-{self.name}", self._guarded)

    def stop(self) -> None:
        """Ask for the end: SIGTERM now, SIGKILL after the grace period."""
        with self.lock:
            self.status = "Stopping"
            self.modified = now()
        self.stop_requested.set()

    @abstractmethod
    def run(self) -> None:
        """Do the job; sets the final status."""

    @abstractmethod
    def fail(self, reason: str) -> None:
        """End as Failed."""

    def _guarded(self) -> None:
        try:
            self.run()
        except InputError as error:
            self.fail(str(error))
        except ClientError as error:
            self.fail(f"ClientError: {error}")
        except Exception as error:
            # Whatever it was, a job must not stay in progress for ever.
            if not self.services.closing.is_set():
                log.exception("%s %s", self.kind, self.name)
            self.fail(f"InternalServerError: {error}")
        finally:
            if self.cluster is not None:
                self.cluster.close()
            self.finished.set()

    def new_cluster(self, plans: list[HostPlan], volumes: list[str]) -> Cluster:
        """Hosts for the next attempt; those of the last one are removed."""
        if self.cluster is not None:
            self.cluster.close()
        attempt = f"{self.kind}-{self.name}-{next(_attempts)}"
        self.cluster = Cluster(self.services, self.name, attempt, plans, volumes)
        return self.cluster

    def log_sink(self, host: Host, line: Callable[[str], None] | None = None) -> Callable[[str], None]:
        """Where a host's output goes: its CloudWatch stream, and `line` if given."""
        fault = self.services.faults.for_job("slow_logs", self.name)
        stream = f"{self.name}/{host.name}-{int(time.time())}"
        delay = fault.after if fault else 0.0
        add = self.services.log(self.region, self.role, self.log_group, stream, delay)

        def sink(text: str) -> None:
            add(text)
            if line is not None:
                line(text)

        return sink

    def isolation(self) -> str | None:
        """What to say in a description where hosts are not isolated."""
        pool = self.services.pool
        return None if pool.namespaces else f"emulated with loopback hosts ({pool.reason})"

    def require_running(self, noun: str) -> None:
        """Refuse to stop what has ended."""
        if self.status in TERMINAL:
            raise validation(f"The request was rejected because the {noun} is in status {self.status}.")


J = TypeVar("J", bound=Job)


class JobTable(dict[tuple[str, str], J]):
    """Jobs by region and name."""

    def find(self, call: Call, name: str, error: ApiError) -> J:
        """The job, or `error`."""
        job = self.get((call.region, name))
        if job is None:
            raise error
        return job

    def of_region(self, region: str) -> list[J]:
        """All jobs of a region."""
        return [job for (place, _), job in list(self.items()) if place == region]


def write_json(path: Path, content: Any) -> None:
    """Write a configuration file of the container contract."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def first_characters(path: Path, count: int = 1024) -> str:
    """Start of a text file the container wrote, or nothing."""
    try:
        with path.open(errors="replace") as file:
            return file.read(count).strip()
    except OSError:
        return ""
