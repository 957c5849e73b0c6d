"""What an endpoint host is: it serves approved model versions, each smoke-tested before it is switched to."""

from __future__ import annotations

import logging
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal

import dagster as dg
from pydantic import BaseModel, Field, model_validator

from resources.endpoints import captured_files as captures
from resources.inventory import OwnedItem
from resources.model_registry.base import ModelVersion, check_name
from step_scripts.runner.contract import FrozenModel
from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import CaptureCounts
from step_scripts.table.spec import TableSpec

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


class SmokeTestResult(BaseModel, frozen=True):
    """Figures of a passed smoke test. `latency`: of requests of one row, as metadata."""

    rows: int
    largest_difference: float = Field(description="Relative to the expected prediction.")
    latency: dict[str, float] = {}

    def of(self, version: str) -> str:
        """The figures as a line for a log."""
        median = self.latency["median_milliseconds"]
        figures = f"largest relative difference {self.largest_difference:g}, {median:g} ms a row"
        return f"Smoke test of {version}: {counted(self.rows, 'row')}, {figures}."


@dataclass(frozen=True)
class Answers:
    """What an endpoint answered to rows, and what it should have. `milliseconds`: how long each request took."""

    rows: Sequence[str]
    expected: Sequence[float]
    served: Sequence[float]
    milliseconds: Sequence[float]

    @property
    def differences(self) -> list[float]:
        """Relative to the expected predictions, or to 1 where those are smaller; infinite where none was served."""
        pairs = zip(self.served, self.expected, strict=True)
        return [abs(s - e) / max(abs(e), 1.0) if math.isfinite(s) else math.inf for s, e in pairs]

    @property
    def latency(self) -> dict[str, float]:
        """As metadata."""
        return {
            "median_milliseconds": round(statistics.median(self.milliseconds), 3),
            "slowest_milliseconds": round(max(self.milliseconds), 3),
        }


class SmokeTest(FrozenModel):
    """Known rows and the predictions that the model gave for them offline.

    A served prediction is right if it differs by at most `tolerance` times the expected value's size (or 1, if that is
    larger).
    """

    rows: tuple[str, ...] = Field(description="Raw rows, each a line of CSV.")
    expected: tuple[float, ...] = Field(min_length=1)
    tolerance: float = Field(default=1e-6, ge=0)

    @model_validator(mode="after")
    def _one_row_a_prediction(self) -> SmokeTest:
        if len(self.rows) != len(self.expected):
            rows = counted(len(self.rows), "row")
            raise ValueError(f"{counted(len(self.expected), 'expected prediction')} for {rows}")
        return self

    def ask(self, invoke: Callable[[bytes], bytes], most: int | None = None) -> Answers:
        """Ask for the rows, `most` of them, in a request of its own each.

        `invoke` sends CSV to the endpoint and returns its answer, CSV.
        """
        rows, served, milliseconds = self.rows[:most], [], []
        for row in rows:
            start = time.perf_counter()
            answer = invoke(row.encode())
            milliseconds.append((time.perf_counter() - start) * 1e3)
            served += [float(line) for line in answer.split()]
        return Answers(rows, self.expected[:most], served, milliseconds)

    def run(self, invoke: Callable[[bytes], bytes]) -> SmokeTestResult:
        """Have all rows predicted at once, then up to 20 of them singly. Raises `SmokeTestFailed`."""
        served = [float(line) for line in invoke("\n".join(self.rows).encode()).split()]
        largest = self._compare(Answers(self.rows, self.expected, served, ()))
        singly = self.ask(invoke, _SINGLE_REQUESTS)
        largest = max(largest, self._compare(singly))
        return SmokeTestResult(rows=len(self.rows), largest_difference=largest, latency=singly.latency)

    def _compare(self, answers: Answers) -> float:
        """The largest difference. Raises `SmokeTestFailed` if one is too large."""
        served, expected = answers.served, answers.expected
        if len(served) != len(expected):
            predictions = counted(len(served), "prediction")
            raise SmokeTestFailed(f"smoke test: {predictions} for {counted(len(expected), 'row')}")
        differences = answers.differences
        if wrong := [row for row, difference in enumerate(differences) if difference > self.tolerance]:
            first = wrong[0]
            raise SmokeTestFailed(
                f"smoke test: {len(wrong)} of {counted(len(expected), 'prediction')} differ from the offline ones; "
                f"the first: {served[first]!r} instead of {expected[first]!r} for {answers.rows[first]}"
            )
        return max(differences)


class EndpointStatus(BaseModel, frozen=True):
    """What an endpoint serves. `previous_version` is what it served before, for going back."""

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


class EndpointHost(dg.ConfigurableResource, ABC):
    """Serves models over HTTP. Assets depend on this type; the deployment picks the implementation."""

    _capture_subfolder: ClassVar[str] = ""  # of an endpoint's folder below `_captured`

    default_name: str = Field(default="housing", description="Endpoint of a deployment that names no other.")
    root: str = Field(description="Below it the host keeps its files.")

    def deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger) -> EndpointStatus:
        """Serve `version` as `name`, without dropping requests if another version is being served.

        A version that is served already, in the same way, is only tested. Raises `VersionNotApproved`, or
        `EndpointDeploymentFailed`, in which case what was served before still is.
        """
        check_name(name, "an endpoint")
        if version.status == "Approved":
            return self._deploy(name, version, smoke_test, log)
        last = version.status_history[-1]
        raise VersionNotApproved(
            f"model version {version.reference} is {version.status} ({last.who}: {last.why}), only approved versions "
            f"are deployed. Approve it in the model registry: set_status({version.group!r}, {version.version}, "
            "'Approved', who=..., why=...)."
        )

    @abstractmethod
    def _deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger) -> EndpointStatus:
        """See `deploy`. The version is approved."""

    @abstractmethod
    def describe(self, name: str) -> EndpointStatus | None:
        """What the endpoint serves, or None if there is no such endpoint."""

    @abstractmethod
    def invoke(self, name: str, body: bytes, content_type: str, accept: str = "*/*", inference_id: str = "") -> bytes:
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

    @property
    @abstractmethod
    def _captured(self) -> str:
        """What the captured requests of all endpoints are below."""

    def captured_files(self) -> Sequence[captures.CapturedFile]:
        """Files of captured requests below this host's root, also of endpoints that are gone.

        Not those captured to another `uri`: they are its owner's business.
        """
        return captures.captured_below(self._captured, self._capture_subfolder)

    def captured(self, name: str, table: TableSpec, since: datetime, limit: int) -> captures.CapturedRows | None:
        """Raw features and predictions of at most `limit` rows, of the latest captured requests since that time.

        None: there is no such endpoint, or its requests are not captured.
        """
        status = self.describe(name)
        if status is None or status.capture_uri is None:
            return None
        return captures.read_captured(status.capture_uri, table, since, limit, without=PROBE_ID)

    def remove_captured(self, files: Sequence[captures.CapturedFile]) -> None:
        """Remove some of them; missing files are ignored. Raises `NotOwned` for what is another's."""
        captures.remove_captured(files, self._captured)

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
