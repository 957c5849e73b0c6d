"""Faults that can be asked for, in Python or through the admin path."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

Kind = Literal[
    "throttle",
    "delay_response",
    "delay_dns",
    "host_never_starts",
    "kill_host",
    "slow_logs",
    "interrupt_spot",
    "fail_endpoint",
    "unprocessed_records",
    "fail_feature_group",
]
KINDS: tuple[str, ...] = Kind.__args__


@dataclass
class Fault:
    """One active fault. Which fields matter depends on the kind; names are shell-style patterns."""

    id: int
    kind: str
    operations: tuple[str, ...] = ("*",)
    job: str = "*"
    host: str = "*"
    endpoint: str = "*"
    seconds: float | None = None
    count: int | None = None
    after: float = 0.0
    noticed: bool = True
    mode: str = "exit"
    created: float = 0.0


class Faults:
    """The active faults of one emulator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._active: dict[int, Fault] = {}

    # -- asking for faults ---------------------------------------------------------------------------------------

    def throttle(self, *operations: str, count: int | None = None, seconds: float | None = None) -> Fault:
        """Answer ThrottlingException to the next `count` calls, or for `seconds`.

        An operation is `CreateTrainingJob`, `logs:GetLogEvents`, `s3:*` or `*` (every
        service's); without a service it is SageMaker's.
        """
        return self.add("throttle", operations=operations or ("*",), count=count, seconds=seconds)

    def delay_response(
        self, *operations: str, after: float, count: int | None = None, seconds: float | None = None
    ) -> Fault:
        """Answer only after `after` seconds."""
        return self.add("delay_response", operations=operations or ("*",), after=after, count=count, seconds=seconds)

    def delay_dns(self, host: str, after: float, job: str = "*") -> Fault:
        """Leave `host` out of the other hosts' /etc/hosts for `after` seconds from their start."""
        return self.add("delay_dns", host=host, after=after, job=job)

    def host_never_starts(self, host: str, job: str = "*", count: int | None = None) -> Fault:
        """Do not start `host`, always or the next `count` times; the others wait for it in vain."""
        return self.add("host_never_starts", host=host, job=job, count=count)

    def kill_host(self, job: str, host: str, after: float = 0.0, noticed: bool = True) -> Fault:
        """SIGKILL everything on `host`, `after` seconds into the run.

        With `noticed` the platform sees the container's exit and fails the job; without it only the other hosts'
        exit codes count, as when an instance vanishes and the platform has not found out yet.
        """
        return self.add("kill_host", job=job, host=host, after=after, noticed=noticed, count=1)

    def slow_logs(self, after: float, job: str = "*") -> Fault:
        """Let log events arrive in CloudWatch `after` seconds late."""
        return self.add("slow_logs", after=after, job=job)

    def interrupt_spot(self, job: str, after: float = 0.0) -> Fault:
        """Take the spot instances away, `after` seconds into the run."""
        return self.add("interrupt_spot", job=job, after=after, count=1)

    def fail_endpoint(self, endpoint: str, mode: str = "exit", count: int | None = None) -> Fault:
        """Make the next containers of `endpoint` fail: `exit` at once, or never answer the `ping`."""
        return self.add("fail_endpoint", endpoint=endpoint, mode=mode, count=count)

    def unprocessed_records(self, count: int) -> Fault:
        """Return the next `count` entries of BatchWriteRecord as unprocessed."""
        return self.add("unprocessed_records", count=count)

    def fail_feature_group(self, count: int = 1) -> Fault:
        """Let the next feature groups end as CreateFailed."""
        return self.add("fail_feature_group", count=count)

    def add(self, kind: str, **fields: Any) -> Fault:
        """Add a fault of any kind; raises ValueError for a kind or field that does not exist."""
        if kind not in KINDS:
            raise ValueError(f"no fault of kind {kind!r}; there are {', '.join(KINDS)}")
        operations = fields.pop("operations", ("*",))
        if isinstance(operations, str):
            operations = (operations,)
        try:
            fault = Fault(
                id=next(self._ids), kind=kind, operations=tuple(operations), created=time.monotonic(), **fields
            )
        except TypeError as error:
            raise ValueError(f"fault {kind!r}: {error}") from error
        with self._lock:
            self._active[fault.id] = fault
        return fault

    def clear(self, fault_id: int | None = None) -> None:
        """Remove one fault, or all."""
        with self._lock:
            if fault_id is None:
                self._active.clear()
            else:
                self._active.pop(fault_id, None)

    def active(self) -> list[dict[str, Any]]:
        """The active faults, for people."""
        with self._lock:
            return [asdict(fault) for fault in self._active.values() if not self._expired(fault)]

    # -- asking whether a fault applies ----------------------------------------------------------------------------

    def for_operation(self, kind: str, names: Sequence[str]) -> Fault | None:
        """A fault for an operation known under any of `names`; uses up one count."""
        return self._take(kind, lambda f: any(fnmatchcase(n, p) for n in names for p in f.operations))

    def for_host(self, kind: str, job: str, host: str) -> Fault | None:
        """A fault for one host of one job; counts are used up by whoever acts on it."""
        return self._find(kind, lambda f: fnmatchcase(job, f.job) and fnmatchcase(host, f.host))

    def for_job(self, kind: str, job: str) -> Fault | None:
        """A fault for one job."""
        return self._find(kind, lambda f: fnmatchcase(job, f.job))

    def take(self, fault: Fault) -> bool:
        """Use up one count of a fault; False if nothing was left."""
        return self._take(fault.kind, lambda f: f.id == fault.id) is not None

    def take_for_endpoint(self, endpoint: str) -> Fault | None:
        """A fault for a container of an endpoint that is about to start; uses up one count."""
        return self._take("fail_endpoint", lambda f: fnmatchcase(endpoint, f.endpoint))

    def take_failed_feature_group(self) -> bool:
        """Whether the next feature group is to fail."""
        return self._take("fail_feature_group", lambda _: True) is not None

    def take_unprocessed(self) -> bool:
        """Whether the next entry of BatchWriteRecord is to come back unprocessed."""
        return self._take("unprocessed_records", lambda _: True) is not None

    def _find(self, kind: str, matches: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            for fault in self._active.values():
                if fault.kind == kind and not self._expired(fault) and matches(fault):
                    return fault
        return None

    def _take(self, kind: str, matches: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            for fault in list(self._active.values()):
                if fault.kind != kind or self._expired(fault) or not matches(fault):
                    continue
                if fault.count is not None:
                    fault.count -= 1
                    if fault.count <= 0:
                        self._active.pop(fault.id)
                return fault
        return None

    @staticmethod
    def _expired(fault: Fault) -> bool:
        return fault.seconds is not None and time.monotonic() - fault.created > fault.seconds
