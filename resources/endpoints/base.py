"""What an endpoint host is: it serves approved model versions, each smoke-tested before it is switched to."""

from __future__ import annotations

import logging
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, model_validator

from resources.endpoints.captured_files import CapturedFile, captured_below, remove_captured
from resources.inventory import OwnedItem
from resources.model_registry.base import ModelVersion
from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import CaptureCounts
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from step_scripts.serving.capture import CapturedRows

# The inference id of this project's own test requests: they are not part of the traffic that is watched.
PROBE_ID = "housing-assets-probe"
_SINGLE_REQUESTS = 20


class EndpointNotFound(LookupError):
    """There is no such endpoint. The message names those that exist."""


class VersionNotApproved(ValueError):
    """Only approved versions are deployed."""


class EndpointDeploymentFailed(RuntimeError):
    """The version was not deployed. The message says why, what serves now, and shows the end of the server's log."""


class InvocationFailed(RuntimeError):
    """The endpoint answered with an error. `status` is the HTTP status, `body` the answer."""

    def __init__(self, message: str, *, status: int, body: bytes) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class SmokeTestFailed(ValueError):
    """Served predictions are not the expected ones."""


class SmokeTestResult(BaseModel):
    """Figures of a passed smoke test. Latencies are of requests of one row, in milliseconds."""

    model_config = ConfigDict(frozen=True)

    rows: int
    largest_difference: float
    batch_ms: float
    requests: int
    median_ms: float
    largest_ms: float

    def of(self, version: str) -> str:
        """The figures as a line for a log."""
        figures = f"largest difference {self.largest_difference:g}, {self.median_ms:g} ms a row"
        return f"Smoke test of {version}: {counted(self.rows, 'row')}, {figures}."


class SmokeTest(BaseModel):
    """Known rows and the predictions that the model gave for them offline.

    A served prediction is right if it differs by at most `tolerance` times the expected value's size (or 1, if that is
    larger).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    body: str = Field(description="CSV of raw rows, with or without a header line.")
    expected: tuple[float, ...] = Field(min_length=1)
    tolerance: float = Field(default=1e-6, ge=0)

    @model_validator(mode="after")
    def _one_line_a_prediction(self) -> SmokeTest:
        if len(self._lines) - len(self.expected) not in (0, 1):
            raise ValueError(
                f"{counted(len(self.expected), 'expected prediction')} for {counted(len(self._lines), 'line')} of CSV"
            )
        return self

    @property
    def _lines(self) -> Sequence[str]:
        return self.body.strip("\r\n").splitlines()

    def run(self, invoke: Callable[[bytes], bytes]) -> SmokeTestResult:
        """Have all rows predicted at once, then up to 20 of them singly. Raises `SmokeTestFailed`.

        `invoke` sends CSV to the endpoint and returns its answer, CSV.
        """

        def predict(body: str) -> list[float]:
            return [float(line) for line in invoke(body.encode()).split()]

        lines = self._lines
        header = [lines[0]] if len(lines) > len(self.expected) else []
        rows = lines[len(header) :]
        start = time.perf_counter()
        served = predict(self.body)
        batch_seconds = time.perf_counter() - start
        largest = self._compare(served, self.expected, rows)
        seconds = []
        for row, expected in list(zip(rows, self.expected, strict=True))[:_SINGLE_REQUESTS]:
            start = time.perf_counter()
            served = predict("\n".join([*header, row]))
            seconds.append(time.perf_counter() - start)
            largest = max(largest, self._compare(served, [expected], [row]))
        return SmokeTestResult(
            rows=len(rows),
            largest_difference=largest,
            batch_ms=round(batch_seconds * 1e3, 3),
            requests=len(seconds),
            median_ms=round(statistics.median(seconds) * 1e3, 3),
            largest_ms=round(max(seconds) * 1e3, 3),
        )

    def _compare(self, served: Sequence[float], expected: Sequence[float], rows: Sequence[str]) -> float:
        if len(served) != len(expected):
            raise SmokeTestFailed(
                f"smoke test: {counted(len(served), 'prediction')} for {counted(len(expected), 'row')}"
            )
        wrong = [
            (row, is_, should)
            for row, is_, should in zip(rows, served, expected, strict=True)
            if not math.isfinite(is_) or abs(is_ - should) > self.tolerance * max(1.0, abs(should))
        ]
        if wrong:
            row, is_, should = wrong[0]
            raise SmokeTestFailed(
                f"smoke test: {len(wrong)} of {counted(len(expected), 'prediction')} differ from the offline ones; "
                f"the first: {is_!r} instead of {should!r} for {row}"
            )
        return max((abs(is_ - should) for is_, should in zip(served, expected, strict=True)), default=0.0)


class EndpointStatus(BaseModel):
    """What an endpoint serves. `previous_version` is what it served before, for going back."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: Literal["InService", "OutOfService"]
    url: str = Field(description="Address that POST requests are sent to.")
    version: str = Field(description="`<model group>/<version>`.")
    model_digest: str
    pid: int | None = None
    started_at: datetime | None = None
    deployed_at: datetime
    previous_version: str | None = None
    smoke_test: SmokeTestResult | None = Field(default=None, description="Of this deployment; not kept.")
    captured: CaptureCounts | None = Field(default=None, description="Captured requests, where the server counts them.")
    capture_uri: str | None = Field(
        default=None, exclude=True, description="Where requests are captured. None: they are not. Not kept."
    )


def require_approved(version: ModelVersion) -> None:
    """Raises `VersionNotApproved` with how to approve."""
    if version.status == "Approved":
        return
    last = version.status_history[-1]
    raise VersionNotApproved(
        f"model version {version.reference} is {version.status} ({last.who}: {last.why}), only approved versions are "
        f"deployed. Approve it in the model registry: set_status({version.group!r}, {version.version}, 'Approved', "
        "who=..., why=...)."
    )


class EndpointHost(dg.ConfigurableResource, ABC):
    """Serves models over HTTP. Assets depend on this type; the deployment picks the implementation."""

    default_name: str = Field(default="housing", description="Endpoint of a deployment that names no other.")
    root: str = Field(description="Below it the host keeps its files.")

    @abstractmethod
    def deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger) -> EndpointStatus:
        """Serve `version` as `name`, without dropping requests if another version is being served.

        Raises `VersionNotApproved`, or `EndpointDeploymentFailed`, in which case what was served before still is.
        """

    @abstractmethod
    def describe(self, name: str) -> EndpointStatus | None:
        """What the endpoint serves, or None if there is no such endpoint."""

    @abstractmethod
    def invoke(
        self, name: str, body: bytes, content_type: str, accept: str = "*/*", inference_id: str | None = None
    ) -> bytes:
        """The answer to one request. Raises `EndpointNotFound`, `InvocationFailed`.

        `inference_id` is captured with the request; `PROBE_ID` keeps it out of `captured`.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the endpoint, after the requests in progress. Nothing happens if there is none."""

    @abstractmethod
    def inventory(self) -> Sequence[OwnedItem]:
        """All endpoints of this host, and what they are made of."""

    @abstractmethod
    def remove(self, item: OwnedItem) -> None:
        """Remove what `inventory` listed; nothing happens if it is gone. Raises `NotOwned` for what is another's."""

    @abstractmethod
    def _names(self) -> Sequence[str]:
        """What may be the name of an endpoint of this host."""

    @abstractmethod
    def _capture_folders(self) -> Sequence[str]:
        """Folders of captured requests that are this host's own, one an endpoint, also of endpoints that are gone."""

    @property
    @abstractmethod
    def _captured(self) -> str:
        """What those folders are below."""

    def captured(self, name: str, table: TableSpec, since: datetime, limit: int) -> CapturedRows | None:
        """Raw features and predictions of at most `limit` rows, of the latest captured requests since that time.

        None: there is no such endpoint, or its requests are not captured.
        """
        from step_scripts.serving.capture import read_captured

        status = self.describe(name)
        if status is None or status.capture_uri is None:
            return None
        return read_captured(status.capture_uri, table, since, limit, without=PROBE_ID)

    def captured_files(self) -> Sequence[CapturedFile]:
        """Files of captured requests below this host's root, also of endpoints that are gone."""
        return [file for folder in self._capture_folders() for file in captured_below(folder)]

    def remove_captured(self, files: Sequence[CapturedFile]) -> None:
        """Remove some of them; missing files are ignored. Raises `NotOwned` for what is another's."""
        remove_captured(files, self._captured)

    def _not_served(self, name: str) -> EndpointNotFound:
        names = ", ".join(status.name for status in self.list() if status.state == "InService") or "none"
        return EndpointNotFound(f"endpoint {name} is not served; served are: {names} (in {self.root})")

    def _not_deployed(self, name: str, version: ModelVersion, reason: object) -> EndpointDeploymentFailed:
        kept = self.describe(name)
        now = f"{kept.version} keeps serving" if kept and kept.state == "InService" else "nothing is served"
        return EndpointDeploymentFailed(f"{version.reference} was not deployed to endpoint {name}; {now}. {reason}")

    def list(self) -> Sequence[EndpointStatus]:
        """All endpoints of this host, by name."""
        return [status for name in self._names() if (status := self.describe(name)) is not None]
