"""The CloudWatch logs of all hosts of a job, live and bounded.

Polled, not streamed: each poll makes a bounded number of calls, and the next one goes on where it stopped. After the
job's end `drain` reads on until every stream is at its end.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from resources.aws.calls import is_missing, is_transient, pages
from resources.waiting import wait_until

_TAIL = 30
_LINES_PER_EVENT = 50


class JobLogs:
    """Forwards the lines of a job's hosts to `emit`, prefixed with `[algo-N]`, and keeps each host's last 30.

    `client` should give up after a few attempts: the next poll tries again.
    """

    def __init__(self, client: Any, log_group: str, job_name: str, emit: Callable[[str], None]) -> None:
        self._client = client
        self._group = log_group
        self._job = job_name
        self._emit = emit
        self._read_to: dict[str, str | None] = {}  # by stream: CloudWatch's token
        self._tails: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=_TAIL))  # by host
        self._last_event: dict[str, int] = {}  # by host
        self._refused = False

    def poll(self, calls_per_stream: int = 2) -> bool | None:
        """Forward what has arrived. Whether there was anything; `None` if CloudWatch does not answer.

        An error that a later call will meet too (missing permissions) is reported once and ends the forwarding. None is
        raised: a job does not end because of its log.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        found = False
        try:
            for stream in [] if self._refused else self._streams():
                for _ in range(calls_per_stream):
                    if not self._read(stream):
                        break
                    found = True
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
            if self.poll(calls_per_stream=1_000_000) is not False or (expect_lines and not self._read_to):
                quiet_since = time.monotonic()
            return self._refused or time.monotonic() - quiet_since >= quiet_seconds

        try:
            return wait_until(ended, timeout=seconds, interval=min(0.5, quiet_seconds / 4), what="the end of the log")
        except TimeoutError:
            return False

    def tail(self, host: str) -> list[str]:
        """The last lines of one host, at most 30."""
        return list(self._tails[host])

    def hosts(self) -> list[str]:
        """Hosts that have written something, in the order of their last line: one that failed writes nothing after."""
        return sorted(self._last_event, key=lambda host: (self._last_event[host], host))

    def _streams(self) -> list[str]:
        """Names of all streams: one a host and start of its container."""
        from botocore.exceptions import ClientError

        names = {"logGroupName": self._group, "logStreamNamePrefix": f"{self._job}/"}
        try:
            for item in pages(self._client, "describe_log_streams", "logStreams", **names):
                self._read_to.setdefault(item["logStreamName"], None)
        except ClientError as error:
            if not is_missing(error):  # the group appears with the account's first job
                raise
        return list(self._read_to)

    def _read(self, stream: str) -> bool:
        """Forward the next lines of a stream; whether there were any."""
        token = self._read_to[stream]
        answer = self._client.get_log_events(
            logGroupName=self._group,
            logStreamName=stream,
            startFromHead=True,
            **({"nextToken": token} if token else {}),
        )
        self._read_to[stream] = answer.get("nextForwardToken", token)
        events = answer["events"]
        if not events:
            return False
        host = stream.partition("/")[2].rpartition("-")[0] or stream
        self._last_event[host] = events[-1]["timestamp"]
        lines = [line for event in events for line in event["message"].splitlines() or [""]]
        self._tails[host].extend(lines)
        for start in range(0, len(lines), _LINES_PER_EVENT):
            block = lines[start : start + _LINES_PER_EVENT]
            self._emit("\n".join(f"[{host}] {line}" for line in block))
        return True
