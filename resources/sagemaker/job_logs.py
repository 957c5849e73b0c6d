"""The CloudWatch logs of all hosts of a job, live and bounded.

Polled, not streamed: each poll makes a bounded number of calls, streams that have nothing new are asked less often, and
what a poll leaves is taken by the next. After the job's end `drain` reads on until every stream is at its end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from resources.aws.calls import is_missing, is_transient

_TAIL = 30
_LINES_PER_EVENT = 50


@dataclass
class LogLimits:
    """Bounds of one poll, and how often to poll. Seconds."""

    interval: float = 2.0
    idle_interval: float = 20.0
    discovery_interval: float = 10.0
    calls_per_poll: int = 10
    lines_per_call: int = 1000
    quiet_seconds: float = 3.0


@dataclass
class _Stream:
    """One host's stream: where it has been read to, when to ask again."""

    name: str
    host: str
    token: str | None = None
    due: float = 0.0
    pause: float = 0.0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))
    last_event: int = 0


class JobLogs:
    """Forwards the lines of a job's hosts to `emit`, prefixed with `[algo-N]`, and keeps each host's last 30."""

    def __init__(
        self, client: Any, log_group: str, job_name: str, emit: Callable[[str], None], limits: LogLimits | None = None
    ) -> None:
        self._client = client
        self._group = log_group
        self._job = job_name
        self._emit = emit
        self._limits = limits or LogLimits()
        self._streams: dict[str, _Stream] = {}
        self._next_discovery = 0.0
        self._not_before = 0.0
        self._backoff = 0.0
        self._refused = False
        self.lines = 0

    def poll(self) -> bool:
        """Forward what has arrived in the streams that are due. Whether there was anything.

        Throttling and outages put the next poll off, up to 30 seconds. Any other error (missing permissions) is
        reported once and ends the forwarding. Neither is raised: a job does not end for its log.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        now = time.monotonic()
        if self._refused or now < self._not_before:
            return False
        found = False
        try:
            self._discover(now)
            due = sorted((s for s in self._streams.values() if s.due <= now), key=lambda s: s.due)
            for stream in due[: self._limits.calls_per_poll]:
                found = self._read(stream) or found
        except (ClientError, BotoCoreError) as error:
            if not is_transient(error):
                self._refused = True
                self._emit(f"The job's log lines cannot be read: {error}")
                return found
            self._backoff = min(30.0, 2 * self._backoff or 1.0)
            self._not_before = time.monotonic() + self._backoff
            return found
        self._backoff = 0.0
        return found

    def drain(self, seconds: float, *, expect_lines: bool = True) -> bool:
        """Read to the end of all streams, for at most `seconds`; whether that succeeded.

        CloudWatch gets lines a moment after they were written, so a stream counts as ended when it has had nothing
        new for `quiet_seconds`. With `expect_lines`, that there is no stream yet is no end.
        """
        deadline = time.monotonic() + seconds
        quiet_since = time.monotonic()
        while not self._refused:
            self._next_discovery = 0.0
            for stream in self._streams.values():
                stream.due = 0.0
            reached = time.monotonic() >= self._not_before
            if self.poll():
                quiet_since = time.monotonic()
            now = time.monotonic()
            settled = reached and self._backoff == 0.0 and (bool(self._streams) or not expect_lines)
            if settled and now - quiet_since >= self._limits.quiet_seconds and self._all_asked():
                return True
            if now >= deadline:
                return settled and self._all_asked()
            time.sleep(min(0.5, max(0.05, deadline - now), max(0.05, self._limits.quiet_seconds / 4)))
        return True

    def tail(self, host: str) -> list[str]:
        """The last lines of one host, at most 30."""
        lines = [line for stream in self._streams.values() if stream.host == host for line in stream.tail]
        return lines[-_TAIL:]

    def hosts(self) -> list[str]:
        """Hosts that have written something, algo-2 before algo-10."""
        return sorted({s.host for s in self._streams.values()}, key=_natural)

    def silent_first(self) -> list[str]:
        """Hosts in the order of their last line: one that failed writes nothing after."""
        last: dict[str, int] = {}
        for stream in self._streams.values():
            last[stream.host] = max(last.get(stream.host, 0), stream.last_event)
        return sorted(last, key=lambda host: (last[host], _natural(host)))

    def _all_asked(self) -> bool:
        return all(stream.due > 0.0 for stream in self._streams.values())

    def _discover(self, now: float) -> None:
        from botocore.exceptions import ClientError

        if now < self._next_discovery:
            return
        self._next_discovery = now + (self._limits.discovery_interval if self._streams else self._limits.interval)
        token: str | None = None
        while True:
            params = {"nextToken": token} if token else {}
            try:
                answer = self._client.describe_log_streams(
                    logGroupName=self._group, logStreamNamePrefix=f"{self._job}/", **params
                )
            except ClientError as error:
                if is_missing(error):  # the group appears with the account's first job
                    return
                raise
            for item in answer["logStreams"]:
                name = item["logStreamName"]
                host = name.partition("/")[2].rpartition("-")[0] or name
                self._streams.setdefault(name, _Stream(name, host))
            token = answer.get("nextToken")
            if not token:
                return

    def _read(self, stream: _Stream) -> bool:
        params = {"nextToken": stream.token} if stream.token else {}
        answer = self._client.get_log_events(
            logGroupName=self._group,
            logStreamName=stream.name,
            startFromHead=True,
            limit=self._limits.lines_per_call,
            **params,
        )
        stream.token = answer.get("nextForwardToken", stream.token)
        events = answer["events"]
        if not events:
            stream.pause = min(self._limits.idle_interval, 1.5 * (stream.pause or self._limits.interval))
            stream.due = time.monotonic() + stream.pause
            return False
        stream.pause = 0.0
        full = len(events) >= self._limits.lines_per_call
        stream.due = time.monotonic() + (0.01 if full else self._limits.interval)
        stream.last_event = events[-1]["timestamp"]
        lines = [line for event in events for line in event["message"].splitlines() or [""]]
        stream.tail.extend(lines)
        self.lines += len(lines)
        for start in range(0, len(lines), _LINES_PER_EVENT):
            block = lines[start : start + _LINES_PER_EVENT]
            self._emit("\n".join(f"[{stream.host}] {line}" for line in block))
        return True


def _natural(host: str) -> tuple[str, int]:
    name, _, number = host.rpartition("-")
    return (name, int(number)) if number.isdigit() else (host, 0)
