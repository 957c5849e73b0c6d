"""The CloudWatch logs of all hosts of a job, live and bounded.

Polled, not streamed: each poll makes a bounded number of calls, and the next one goes on where it stopped. After the
job's end `drain` reads on until every stream is at its end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from resources.aws.calls import is_missing, is_transient, pages
from resources.waiting import wait_until

_CALLS_PER_POLL = 10
_TAIL = 30
_LINES_PER_EVENT = 50


@dataclass
class _Stream:
    """One host's stream, and where it has been read to."""

    name: str
    host: str
    token: str | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))
    last_event: int = 0


class JobLogs:
    """Forwards the lines of a job's hosts to `emit`, prefixed with `[algo-N]`, and keeps each host's last 30.

    `client` should give up after a few attempts: the next poll tries again.
    """

    def __init__(self, client: Any, log_group: str, job_name: str, emit: Callable[[str], None]) -> None:
        self._client = client
        self._group = log_group
        self._job = job_name
        self._emit = emit
        self._streams: deque[_Stream] = deque()  # the next to be read comes first
        self._refused = False

    def poll(self, calls: float = _CALLS_PER_POLL) -> bool | None:
        """Forward what has arrived. Whether there was anything; `None` if CloudWatch does not answer.

        An error that a later call will meet too (missing permissions) is reported once and ends the forwarding. None is
        raised: a job does not end because of its log.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        found = False
        if self._refused:
            return found
        try:
            self._discover()
            for _ in range(len(self._streams)):
                stream = self._streams[0]
                while calls > 0 and (arrived := self._read(stream)):
                    found, calls = arrived, calls - 1
                if calls <= 0:
                    break
                calls -= 1
                self._streams.rotate(-1)
        except (ClientError, BotoCoreError) as error:
            if is_transient(error):
                return None
            self._refused = True
            self._emit(f"The job's log lines cannot be read: {error}")
        return found

    def drain(self, seconds: float, *, quiet_seconds: float, expect_lines: bool = True) -> bool:
        """Read to the end of all streams, for at most `seconds`; whether that succeeded.

        CloudWatch gets lines a moment after they were written, so the end is reached when there has been nothing new
        for `quiet_seconds`. With `expect_lines`, a job without streams has not reached it.
        """
        quiet_since = time.monotonic()

        def ended() -> bool:
            nonlocal quiet_since
            if self.poll(calls=float("inf")) is not False or (expect_lines and not self._streams):
                quiet_since = time.monotonic()
            return self._refused or time.monotonic() - quiet_since >= quiet_seconds

        try:
            return wait_until(ended, timeout=seconds, interval=min(0.5, quiet_seconds / 4), what="the end of the log")
        except TimeoutError:
            return False

    def tail(self, host: str) -> list[str]:
        """The last lines of one host, at most 30."""
        lines = [line for stream in self._streams if stream.host == host for line in stream.tail]
        return lines[-_TAIL:]

    def hosts(self) -> list[str]:
        """Hosts that have written something, in the order of their last line: one that failed writes nothing after."""
        last: dict[str, int] = {}
        for stream in self._streams:
            last[stream.host] = max(last.get(stream.host, 0), stream.last_event)
        return sorted(last, key=lambda host: (last[host], host))

    def _discover(self) -> None:
        from botocore.exceptions import ClientError

        known = {stream.name for stream in self._streams}
        names = {"logGroupName": self._group, "logStreamNamePrefix": f"{self._job}/"}
        try:
            for item in pages(self._client, "describe_log_streams", "logStreams", **names):
                if (name := item["logStreamName"]) not in known:
                    self._streams.appendleft(_Stream(name, name.partition("/")[2].rpartition("-")[0] or name))
        except ClientError as error:
            if not is_missing(error):  # the group appears with the account's first job
                raise

    def _read(self, stream: _Stream) -> bool:
        """Forward the next lines of a stream; whether there were any."""
        params = {"nextToken": stream.token} if stream.token else {}
        answer = self._client.get_log_events(
            logGroupName=self._group, logStreamName=stream.name, startFromHead=True, **params
        )
        stream.token = answer.get("nextForwardToken", stream.token)
        events = answer["events"]
        if not events:
            return False
        stream.last_event = events[-1]["timestamp"]
        lines = [line for event in events for line in event["message"].splitlines() or [""]]
        stream.tail.extend(lines)
        for start in range(0, len(lines), _LINES_PER_EVENT):
            block = lines[start : start + _LINES_PER_EVENT]
            self._emit("\n".join(f"[{stream.host}] {line}" for line in block))
        return True
