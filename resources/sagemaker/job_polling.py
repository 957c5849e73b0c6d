"""How often the client looks at a job, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, field

from resources.sagemaker.job_logs import LogLimits


@dataclass(frozen=True)
class JobPolling:
    """How often to ask, and how long to wait. Seconds.

    `interval` grows to `longest_interval` while a job's status does not change. `patience` bounds a row of throttled
    or failed calls. `drain` bounds the wait for the last messages and log lines after a job's end, `stop` the wait
    for a job that was told to stop.
    """

    interval: float = 2.0
    longest_interval: float = 20.0
    patience: float = 900.0
    message_interval: float = 1.0
    drain: float = 20.0
    stop: float = 30.0
    lease: float = 15.0
    logs: LogLimits = field(default_factory=LogLimits)
