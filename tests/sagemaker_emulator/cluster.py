"""The hosts of one attempt of a job, from their start to the last exit."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import BotoCoreError, ClientError

from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.storage import Mirror

log = logging.getLogger(__name__)

_TICK = 0.05


class End(Enum):
    """Why an attempt ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"
    INTERNAL = "internal error"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and on which host with which code if it failed."""

    end: End
    host: Host | None = None
    code: int = 0
    detail: str = ""


@dataclass(frozen=True)
class HostPlan:
    """One host to be: name, instance type, instance group."""

    name: str
    instance_type: str
    group: str = "homogeneousCluster"


def plan_hosts(groups: Sequence[tuple[str, str, int]]) -> list[HostPlan]:
    """Hosts algo-1 … algo-N over instance groups given as (name, instance type, count)."""
    plans: list[HostPlan] = []
    for group, instance_type, count in groups:
        plans += [HostPlan(f"algo-{len(plans) + n + 1}", instance_type, group) for n in range(count)]
    return plans


def resource_config(plans: Sequence[HostPlan], current: HostPlan, interface: str) -> Params:
    """Content of resourceconfig.json on one host. Host names are sorted as text, as SageMaker does."""
    groups: dict[str, list[HostPlan]] = {}
    for plan in plans:
        groups.setdefault(plan.group, []).append(plan)
    return {
        "current_host": current.name,
        "current_instance_type": current.instance_type,
        "current_group_name": current.group,
        "hosts": sorted(plan.name for plan in plans),
        "instance_groups": [
            {
                "instance_group_name": name,
                "instance_type": members[0].instance_type,
                "hosts": sorted(plan.name for plan in members),
            }
            for name, members in groups.items()
        ],
        "network_interface_name": interface,
    }


@dataclass
class Cluster:
    """Hosts of one attempt. `attempt` is unique over all jobs of the emulator."""

    services: Services
    job: str
    attempt: str
    plans: Sequence[HostPlan]
    volumes: Sequence[str] = ()
    hosts: list[Host] = field(default_factory=list)
    absent: list[Host] = field(default_factory=list)
    unnoticed: set[str] = field(default_factory=set)
    started: float = 0.0
    _late_names: list[tuple[float, str]] = field(default_factory=list)
    _changed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        for plan in self.plans:
            host = self.services.pool.create(self.attempt, plan.name, self.volumes)
            host.on_exit = self._changed.set
            self.hosts.append(host)

    @property
    def interface(self) -> str:
        """Network interface the hosts talk over."""
        return "eth0" if self.services.pool.namespaces else "lo"

    def start(
        self,
        command: Sequence[str],
        environment: Callable[[Host], Mapping[str, str]],
        workdir: str,
        sink: Callable[[Host], Callable[[str], None]],
    ) -> None:
        """Start the command on every host that is to start."""
        self.started = time.monotonic()
        faults = self.services.faults
        for host in self.hosts:
            if fault := faults.for_host("delay_dns", self.job, host.name):
                self._late_names.append((self.started + fault.after, host.name))
        self._write_names()
        for host in self.hosts:
            fault = faults.for_host("host_never_starts", self.job, host.name)
            if fault and faults.take(fault):
                self.absent.append(host)
            else:
                host.start(command, environment(host), workdir, sink(host))

    def supervise(
        self, stop: threading.Event, interrupt: threading.Event, deadline: float, spot: bool = False
    ) -> Outcome:
        """Wait for the end of all hosts; stop them when something ends the attempt early."""
        reason: Outcome | None = None
        kill_at = 0.0
        while any(host.running for host in self.hosts):
            self._changed.wait(_TICK)
            self._changed.clear()
            self._apply_faults(interrupt if spot else None)
            if self.services.closing.is_set():
                self.kill()
            if reason is None:
                reason = self._reason(stop, interrupt, deadline)
                if reason is not None:
                    grace = self.services.settings.stop_grace
                    if reason.end is End.FAILED:
                        grace = min(grace, self.services.settings.failure_grace)
                    kill_at = time.monotonic() + grace
                    for host in self.hosts:
                        host.terminate()
            elif time.monotonic() > kill_at:
                self.kill()
        return reason or self._result()

    def kill(self) -> None:
        """SIGKILL every host."""
        for host in self.hosts:
            host.kill()

    def close(self) -> None:
        """Remove every host."""
        for host in self.hosts:
            host.close()

    def _reason(self, stop: threading.Event, interrupt: threading.Event, deadline: float) -> Outcome | None:
        if stop.is_set() or self.services.closing.is_set():
            return Outcome(End.STOPPED)
        if interrupt.is_set():
            return Outcome(End.INTERRUPTED)
        if time.monotonic() > deadline:
            return Outcome(End.TIMED_OUT)
        return self._failure()

    def _failure(self) -> Outcome | None:
        for host in self.hosts:
            if host.started and not host.running and host.exit_code and host.name not in self.unnoticed:
                return Outcome(End.FAILED, host, host.exit_code)
        return None

    def _result(self) -> Outcome:
        if failure := self._failure():
            return failure
        if self.absent:
            names = ", ".join(host.name for host in self.absent)
            return Outcome(End.INTERNAL, detail=f"no instance could be started for {names}")
        if all(host.name in self.unnoticed for host in self.hosts):
            return Outcome(End.INTERNAL, detail="all instances were lost")
        return Outcome(End.COMPLETED)

    def _apply_faults(self, interrupt: threading.Event | None) -> None:
        now = time.monotonic()
        faults = self.services.faults
        if any(due <= now for due, _ in self._late_names):
            self._late_names = [(due, name) for due, name in self._late_names if due > now]
            self._write_names()
        for host in self.hosts:
            fault = faults.for_host("kill_host", self.job, host.name) if host.running else None
            if fault and now - self.started >= fault.after and faults.take(fault):
                if not fault.noticed:
                    self.unnoticed.add(host.name)
                host.kill()
        if interrupt is not None and not interrupt.is_set():
            fault = faults.for_job("interrupt_spot", self.job)
            if fault and now - self.started >= fault.after and faults.take(fault):
                interrupt.set()

    def _write_names(self) -> None:
        late = {name for _, name in self._late_names}
        for host in self.hosts:
            names = {h.name: h.address for h in self.hosts if h is host or h.name not in late}
            host.set_names(names)


class Follower:
    """Keeps S3 in step with the hosts' directories while they run, and once more at the end."""

    def __init__(self, mirrors: Sequence[Mirror], interval: float) -> None:
        self._mirrors = mirrors
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="emulator-follower", daemon=True)
        if mirrors:
            self._thread.start()

    def finish(self) -> None:
        """Stop, after a last pass; raises what S3 raised in that pass."""
        self._stop.set()
        if self._mirrors:
            self._thread.join()
        for mirror in self._mirrors:
            mirror.sync()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                for mirror in self._mirrors:
                    mirror.sync()
            except (ClientError, BotoCoreError, S3UploadFailedError, OSError):
                log.exception("upload failed, will be tried again")
