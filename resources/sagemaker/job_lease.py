"""Who looks after a job: an object beside it, renewed while a Dagster process is attached.

It tells a job whose process was killed, which the next run takes over, from one that another run still attends to.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import UTC, datetime
from typing import Any, Literal

from resources.sagemaker.job_files import JobPrefix

LEASE = "lease.json"


class JobLease:
    """This process's claim on one job; deleting the object gives it up. Renewed every `interval_seconds`."""

    def __init__(self, prefix: JobPrefix, run_id: str, *, interval_seconds: float = 15.0) -> None:
        self._prefix = prefix
        self._run_id = run_id
        self.interval_seconds = interval_seconds
        self._next = 0.0

    def take(self) -> None:
        """Claim the job, whoever held it."""
        self._prefix.put(LEASE, self._content())
        self._next = time.monotonic() + self.interval_seconds

    def renew(self) -> None:
        """Claim it again if it is time. A failure is passed over: the next call tries again."""
        from botocore.exceptions import BotoCoreError, ClientError

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.interval_seconds
        try:
            self._prefix.client.put_object(
                Bucket=self._prefix.bucket, Key=self._prefix.path(LEASE), Body=self._content()
            )
        except (ClientError, BotoCoreError):
            self._next = time.monotonic() + 1.0

    def adopt(self) -> bool:
        """Take the claim over if its holder is gone; whether that succeeded.

        A holder in another process of this machine is gone when that process is. Another one is gone when it has let
        two intervals pass without renewing: this waits for that. Of two that try at once one succeeds.
        """
        found = self._prefix.get(LEASE)
        if found is None:
            return False  # ended in order, or was left running on purpose
        content, tag = found
        holder = _holder(json.loads(content))
        if holder == "here":
            return False
        if holder == "unknown":
            deadline = time.monotonic() + 2 * self.interval_seconds
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self.interval_seconds / 4))
                found = self._prefix.get(LEASE)
                if found is None or found[1] != tag:
                    return False
        return self._prefix.put_if_unchanged(LEASE, self._content(), tag) is not None

    def _content(self) -> bytes:
        import psutil

        claim = {
            "run_id": self._run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "renewed_at": datetime.now(UTC).isoformat(),
        }
        return json.dumps(claim).encode()


def _holder(claim: dict[str, Any]) -> Literal["here", "gone", "unknown"]:
    """Where the holder is. Unknown if it is on another machine, or this very process in an earlier run."""
    import psutil

    if claim.get("host") != socket.gethostname() or claim.get("pid") == os.getpid():
        return "unknown"
    try:
        started = psutil.Process(int(claim["pid"])).create_time()
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError, ValueError):
        return "gone"
    return "here" if abs(started - float(claim.get("process_started", 0.0))) < 1.0 else "gone"
