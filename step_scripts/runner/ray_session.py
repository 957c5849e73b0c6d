"""The Ray session that a driver process holds: a private one on this machine, or a given cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from step_scripts.runner.code_version import NodeReport, report_of_node
from step_scripts.runner.environment import environment_set
from step_scripts.runner.loaded_code import JOURNAL
from step_scripts.runner.private_files import write_private
from step_scripts.runner.ray_join import join_cluster
from step_scripts.runner.ray_watch import RayWatch
from step_scripts.runner.session_folder import FOLDER_VARIABLE, SessionFolder, make_folder, remove_abandoned

_PACKAGE_FOLDER = Path(__file__).parents[1]
_REPORT_SECONDS = 60.0
_POLARS_ALLOCATOR = "_RJEM_MALLOC_CONF"
# Of the processes that Ray starts.
_WORKER_ENVIRONMENT = {
    # XGBoost's threads would otherwise spin while they wait for each other. If other processes use the same cores, a
    # fit on two threads then takes up to 30 times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # There is a worker for each CPU.
    "POLARS_MAX_THREADS": "1",
    # glibc would return the memory of large columns to the system at once. Getting it back, zeroed page by page, took
    # over a quarter of the CPU time of ingestion on a virtual machine. Workers keep up to 256 MiB. Polars has its own
    # allocator, which would return freed memory after half a second.
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    _POLARS_ALLOCATOR: "dirty_decay_ms:10000",
}


_private_folders: list[Path] = []


def private_folder_of_session() -> Path | None:
    """The folder of the private session that this process has started. None: there is none, or a given cluster."""
    return _private_folders[-1] if _private_folders else None


class RaySettings(BaseModel):
    """How to reach or start Ray. With `address`, that cluster is used and never shut down.

    `ship_code=False` is for a cluster whose nodes have this code already.
    """

    address: str | None = None
    ship_code: bool = True
    num_cpus: int | None = None
    object_store_memory: int | None = None


@dataclass
class RaySession:
    """Starts Ray on first use. `stop` ends what was started here and removes its temporary folder.

    `on_loss` is called, in a thread, when a process of a private session has ended without which Ray cannot work.
    """

    settings: RaySettings
    temporary_folder: Path | None = field(default=None)
    on_loss: Callable[[str], None] | None = None
    _own_folder: SessionFolder | None = None
    _watch: RayWatch | None = None
    _started: bool = False
    _reports: dict[str, NodeReport] | None = None

    @property
    def journal(self) -> Path | None:
        """The file to which the workers of a private session add what they load (`step_scripts.runner.loaded_code`)."""
        return self.temporary_folder / "loaded-code" if self._started and self.temporary_folder is not None else None

    def ensure(self) -> None:
        """Start or join Ray, once. Raises `StepError` if a given cluster cannot be joined."""
        if self._started:
            return
        if sys.flags.optimize > 1:
            raise RuntimeError("Ray cannot start without docstrings: unset PYTHONOPTIMIZE=2, or leave out -OO")
        common = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
        if self.settings.address:
            shipped = {"py_modules": [str(_PACKAGE_FOLDER)]} if self.settings.ship_code else None
            join_cluster(self.settings.address, runtime_env=shipped, **common)
        else:
            if self.temporary_folder is None:
                remove_abandoned()
                # Short: Ray puts sockets below it, and a socket's path is limited to 107 bytes.
                self._own_folder = make_folder("ray-")
                self.temporary_folder = self._own_folder.path
            if self.on_loss is not None and self._watch is None:
                self._watch = RayWatch(self.temporary_folder, self.on_loss)
            _require_token(self.temporary_folder)
            own = {FOLDER_VARIABLE: str(self.temporary_folder), JOURNAL: str(self.temporary_folder / "loaded-code")}
            cpus = self.settings.num_cpus or available_cpus()
            import ray

            with environment_set(_session_environment(cpus) | own):
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    object_store_memory=self.settings.object_store_memory,
                    include_dashboard=False,
                    # A folder in ours, because Ray opens it to all users.
                    _temp_dir=str(self.temporary_folder / "r"),
                    **common,
                )
            _private_folders.append(self.temporary_folder)
        self._started = True

    def stop(self) -> None:
        """Disconnect; end a private session and remove its folder."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._started:
            import ray

            ray.shutdown()
            self._started = False
        if self.temporary_folder is not None:
            if self.temporary_folder in _private_folders:
                _private_folders.remove(self.temporary_folder)
            shutil.rmtree(self.temporary_folder, ignore_errors=True)
            self.temporary_folder = None
        if self._own_folder is not None:
            self._own_folder.release()
            self._own_folder = None

    @property
    def is_started(self) -> bool:
        """Whether there is a session: Ray has been started, or a given cluster joined."""
        return self._started

    def loss(self) -> str | None:
        """Which of Ray's processes has ended and how, if one has that is watched."""
        return None if self._watch is None else self._watch.loss()

    def node_reports(self) -> dict[str, NodeReport]:
        """What the nodes of a given cluster have, by address; empty for a private session.

        They are asked once. A node that does not answer within a minute is left out: it is lost, or takes no task.
        """
        if not self._started or not self.settings.address:
            return {}
        if self._reports is None:
            import ray
            from ray.exceptions import RayError
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            remote = ray.remote(report_of_node)
            asked = {}
            for node in ray.nodes():
                if node["Alive"]:
                    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    asked[remote.options(num_cpus=0, scheduling_strategy=there).remote()] = node["NodeManagerAddress"]
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_REPORT_SECONDS)
            self._reports = {}
            for answer in answered:
                with contextlib.suppress(RayError):
                    self._reports[asked[answer]] = ray.get(answer)
        return self._reports

    def nodes(self) -> list[str]:
        """Addresses of the nodes that are alive; empty if Ray was not started."""
        if not self._started:
            return []
        import ray

        return sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})

    def cpus(self) -> float:
        """Logical CPUs of all nodes; 1 if Ray was not started."""
        if not self._started:
            return 1.0
        import ray

        return float(ray.cluster_resources().get("CPU", 1.0))


def _require_token(folder: Path) -> None:
    """Have Ray refuse whoever does not know a secret in a file in `folder`: its ports are open to the network.

    Unless `RAY_AUTH_MODE` says otherwise, Ray wants a token for a cluster that `ray.init` starts. What the user has set
    is for other clusters.
    """
    path = folder / "ray_token"
    if not path.exists():
        write_private(path, secrets.token_hex(32).encode())
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # the token itself would win over the file
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    # Ray recommends to choose a mode.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def worker_environment() -> dict[str, str]:
    """Settings of the processes that Ray starts, as environment variables. What the user has set is kept, except how
    soon Polars gives memory back.
    """
    chosen = {name: os.environ.get(name, value) for name, value in _WORKER_ENVIRONMENT.items()}
    # Polars sets this variable when it is imported, and child processes inherit it. Of several values the last counts.
    given = os.environ.get(_POLARS_ALLOCATOR)
    chosen[_POLARS_ALLOCATOR] = ",".join(filter(None, (given, _WORKER_ENVIRONMENT[_POLARS_ALLOCATOR])))
    return chosen


def available_cpus() -> int:
    """CPUs that this process may use, at least 1. Ray itself would count all CPUs of the machine.

    Affinity (`taskset`) limits them, and the quotas of control groups, which containers and systemd set.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *map(int, _cpu_quotas(Path("/")))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPUs that the control groups of this process allow, in both versions of Linux's interface below `root`."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            version_2 = controllers == ""
            if not version_2 and "cpu" not in controllers.split(","):
                continue
            top = groups if version_2 else groups / "cpu"
            # Inside a container the path is often that of the host; the group's files are then at the top.
            own = top / name.strip("/")
            for group in [top, *(p for p in [own, *own.parents] if p.is_relative_to(top) and p != top)]:
                with contextlib.suppress(OSError, ValueError):
                    if version_2:
                        quota, period = (group / "cpu.max").read_text().split()
                    else:
                        quota, period = ((group / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
                    if float(quota) > 0:  # "max" is no number, -1 no limit
                        yield float(quota) / float(period)


def _session_environment(num_cpus: int) -> dict[str, str]:
    """`worker_environment`, and how many idle workers are kept.

    Ray ends idle workers when there are more processes than CPUs, so the actors of a search would displace those that
    the next step uses. Twice as many are kept.
    """
    idle = "RAY_num_workers_soft_limit"
    kept = os.environ.get(idle, str(2 * num_cpus))
    return {**worker_environment(), idle: kept}
