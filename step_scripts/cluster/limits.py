"""How long the hosts of a job wait for what. Everything that can hang has a limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

PREFIX = "HOUSING_CLUSTER_"


class ClusterLimits(BaseModel):
    """Seconds, each a field of `cluster.json` in the job's folder, or a variable `HOUSING_CLUSTER_<FIELD>`.

    The variable wins. After SIGTERM the platform waits for 120 seconds. `checkpoint_seconds`, `farewell_seconds` and
    twice `stop_seconds` should leave about 30 of them for the removal of the attempt's files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names_seconds: float = Field(default=300.0, gt=0, description="Until the names of this host and the head resolve.")
    start_seconds: float = Field(default=180.0, gt=0, description="From Ray's start on the head until it answers.")
    join_seconds: float = Field(
        default=600.0,
        gt=0,
        description="What the other hosts have to join: from when the head answers, and each from its own start.",
    )
    silent_seconds: float = Field(
        default=120.0, gt=0, description="How long a worker bears with a head that is there and does not answer."
    )
    unreachable_seconds: float = Field(
        default=60.0, gt=0, description="How long a worker bears with a head that cannot be connected to."
    )
    lost_host_seconds: float = Field(
        default=1800.0, gt=0, description="How long the step may go on after a host was lost."
    )
    checkpoint_seconds: float = Field(default=45.0, ge=0, description="What a step has after SIGTERM to save its work.")
    farewell_seconds: float = Field(
        default=15.0, ge=0, description="How long the head waits until workers know the end."
    )
    stop_seconds: float = Field(default=10.0, gt=0, description="From SIGTERM to SIGKILL for Ray's own processes.")
    poll_seconds: float = Field(default=2.0, gt=0, description="The longest pause between two looks at anything.")


def limits_from(document: bytes | None, environment: Mapping[str, str]) -> ClusterLimits:
    """The limits in `cluster.json` (None: there is no such file) and the environment.

    Raises pydantic's `ValidationError` for unknown names and values that are no positive numbers, `ValueError` for a
    file that is no JSON.
    """
    values: dict[str, Any] = json.loads(document) if document else {}
    for name in ClusterLimits.model_fields:
        if (text := environment.get(PREFIX + name.upper())) is not None:
            values[name] = text
    return ClusterLimits.model_validate(values)


class Deadline:
    """A point in time, on the clock that cannot be set."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._end

    @property
    def left(self) -> float:
        """Seconds left; 0 if it is over."""
        return max(0.0, self._end - time.monotonic())


def pauses(longest: float, shortest: float = 0.1, growth: float = 1.5) -> Iterator[float]:
    """Growing pauses between attempts, in seconds, up to `longest`, without end."""
    pause = min(shortest, longest)
    while True:
        yield pause
        pause = min(pause * growth, longest)
