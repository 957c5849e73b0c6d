"""The Ray session that a driver process holds: a private one on this machine, or a given cluster."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel

from step_scripts.runner.code_version import JOURNAL, NodeReport, report_of_node
from step_scripts.runner.contract import StepError
from step_scripts.runner.processes import how_ended
from step_scripts.runner.ray_environment import (
    FOLDER_VARIABLE,
    SessionFolder,
    available_cpus,
    environment_set,
    make_folder,
    only_needed_processes,
    remove_abandoned,
    require_token,
    session_environment,
    use_token_if_present,
)

CONNECT_SECONDS = "HOUSING_RAY_CONNECT_SECONDS"
_DEFAULT_CONNECT_SECONDS = 60.0
_PACKAGE_FOLDER = Path(__file__).parents[1]
_REPORT_SECONDS = 60.0
_NEEDED = ("gcs_server", "raylet")
_LAST_LINES = 3
_INTERRUPTED_SECONDS = 4.0
_POLL_SECONDS = 0.2
Result = TypeVar("Result")
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


class RayNotStarted(RuntimeError):
    """Ray has not come up in time, 30 s by its own measure, or failed otherwise: this process has remains of it."""


@dataclass
class RaySession:
    """Starts Ray on first use. `stop` ends what was started here and removes its temporary folder."""

    settings: RaySettings
    folder: SessionFolder | None = None
    is_started: bool = False
    _reports: dict[str, NodeReport] | None = None

    @property
    def journal(self) -> Path | None:
        """The file to which the workers of a private session add what they load (`code_version`)."""
        return self.folder.path / "loaded-code" if self.folder is not None else None

    def ensure(self) -> None:
        """Start or join Ray, once.

        Raises `StepError` if a given cluster cannot be joined, `RayNotStarted` if Ray gives up while it starts.
        """
        if self.is_started:
            return
        if sys.flags.optimize > 1:
            raise RuntimeError("Ray cannot start without docstrings: unset PYTHONOPTIMIZE=2, or leave out -OO")
        common = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
        if self.settings.address:
            shipped = {"py_modules": [str(_PACKAGE_FOLDER)]} if self.settings.ship_code else None
            join_cluster(self.settings.address, runtime_env=shipped, **common)
        else:
            self._start_private(**common)
        self.is_started = True

    def _start_private(self, **options: Any) -> None:
        if self.folder is None:
            remove_abandoned()
            # Short: Ray puts sockets below it, and a socket's path is limited to 107 bytes.
            self.folder = make_folder("ray-")
        folder = self.folder.path
        require_token(folder)
        cpus = self.settings.num_cpus or available_cpus()
        import ray

        own = {FOLDER_VARIABLE: str(folder), JOURNAL: str(self.journal)}
        with environment_set(session_environment(cpus) | own), only_needed_processes():
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    object_store_memory=self.settings.object_store_memory,
                    include_dashboard=False,
                    _temp_dir=str(folder / "r"),  # a folder in ours, because Ray opens it to all users
                    **options,
                )
            except Exception as error:
                raise RayNotStarted(f"Ray could not be started: {str(error).rstrip('.')}") from error
        _private_folders.append(folder)

    def stop(self) -> None:
        """Disconnect; end a private session and remove its folder."""
        if self.is_started:
            import ray

            ray.shutdown()
            self.is_started = False
        if self.folder is not None:
            with contextlib.suppress(ValueError):
                _private_folders.remove(self.folder.path)
            self.folder.remove()
            self.folder = None

    def loss(self) -> str | None:
        """Which process has ended, and how, without which a private session cannot work; None if none has.

        It is a child whose status nobody has collected yet. Ray itself waits for missed heartbeats: 15 seconds and
        more, a minute during its start.
        """
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if (name := child.name()) in _NEEDED and (ended := _how_child_ended(child.pid)):
                    return f"Ray's process {name} {ended}{self._end_of_log(name)}"
        return None

    def _end_of_log(self, name: str) -> str:
        for log in sorted(self.folder.path.glob(f"r/session_2*/logs/{name}.err")) if self.folder is not None else []:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return ". The end of its log:\n" + "\n".join(lines[-_LAST_LINES:])
        return ""

    def node_reports(self) -> dict[str, NodeReport]:
        """What the nodes of a given cluster have, by address; empty for a private session.

        They are asked once. A node that does not answer within a minute is left out: it is lost, or takes no task.
        """
        if not self.is_started or not self.settings.address:
            return {}
        if self._reports is None:
            import ray
            from ray.exceptions import RayError
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            report = ray.remote(num_cpus=0)(report_of_node)
            asked = {}
            for node in _alive_nodes():
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[report.options(scheduling_strategy=there).remote()] = node["NodeManagerAddress"]
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_REPORT_SECONDS)
            self._reports = {}
            for answer in answered:
                with contextlib.suppress(RayError):
                    self._reports[asked[answer]] = ray.get(answer)
        return self._reports

    def nodes(self) -> list[str]:
        """Addresses of the nodes that are alive; empty if Ray was not started."""
        return sorted({node["NodeManagerAddress"] for node in _alive_nodes()}) if self.is_started else []

    def cpus(self) -> float:
        """Logical CPUs of all nodes; 1 if Ray was not started."""
        if not self.is_started:
            return 1.0
        return float(sum(node["Resources"].get("CPU", 0.0) for node in _alive_nodes())) or 1.0


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _how_child_ended(pid: int) -> str | None:
    """How a child has ended, None if it has not. Its status is left for Ray, which collects it at any moment."""
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except AttributeError:  # macOS
        return "has ended" if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else None
    except ChildProcessError:
        return "has ended; perhaps out of memory"
    if status is None:
        return None
    return how_ended(status.si_status if status.si_code == os.CLD_EXITED else -status.si_status)


def run_in_thread(
    function: Callable[[], Result], on_interrupt: Callable[[], None] | None = None, timeout: float | None = None
) -> Result:
    """The result of `function`, which runs in a second thread; its exception is raised here.

    A signal reaches Python only when the main thread is not inside Ray, and in the main thread Ray Tune and Ray Train
    install signal handlers that they leave behind. On an interrupt `on_interrupt` is called, and the thread has a few
    seconds to end; without it, the thread is left to end with the process. Raises `TimeoutError` after `timeout`
    seconds.
    """
    outcome: Future[Result] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001  # raised again, in the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=call, name="ray-driver", daemon=True).start()
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    try:
        while not wait([outcome], _POLL_SECONDS).done:  # a signal that another thread gets does not end a wait
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {timeout:g} s")
    except BaseException:
        if on_interrupt is not None:
            on_interrupt()
            wait([outcome], _INTERRUPTED_SECONDS)
        raise
    return outcome.result()


def join_cluster(address: str, **options: Any) -> None:
    """`ray.init(address, **options)` with the cluster's token, if there is one on this machine.

    Raises `StepError` if the cluster does not answer within `HOUSING_RAY_CONNECT_SECONDS`, or refuses.
    """
    use_token_if_present()
    limit = float(os.environ.get(CONNECT_SECONDS) or _DEFAULT_CONNECT_SECONDS)
    deadline = time.monotonic() + limit
    host, _, port = address.removeprefix("ray://").rpartition(":")
    silence = f"the Ray cluster at {address} (RAY_ADDRESS) does not answer within {limit:g} s"
    refusal: Exception | None = None

    def join() -> None:
        nonlocal silence, refusal
        while True:
            try:
                if host and port.isdigit():
                    socket.create_connection((host.strip("[]"), int(port)), 5.0).close()
            except OSError as error:
                silence = f"no Ray cluster answers at {address} (RAY_ADDRESS) within {limit:g} s: {error}"
            else:
                import ray

                try:
                    ray.init(address=address, **options)
                except ConnectionError as error:  # a wrong token, or a head that is still starting
                    refusal = error
                else:
                    return
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(0.5)

    try:
        # Ray itself tries for minutes, and cannot be interrupted.
        run_in_thread(join, timeout=max(1.0, deadline - time.monotonic()))
    except TimeoutError:
        if refusal is None:
            raise StepError(
                f"{silence}. Start the cluster, correct RAY_ADDRESS, or unset it to use this machine; "
                f"{CONNECT_SECONDS} is how long to wait"
            ) from None
        raise _refused(address, refusal) from refusal
    except Exception as error:
        raise _refused(address, error) from error


def _refused(address: str, error: Exception) -> StepError:
    reason = " ".join(str(error).split())
    return StepError(
        f"the Ray cluster at {address} (RAY_ADDRESS) cannot be joined: {type(error).__name__}: {reason}. "
        "If it wants a token (RAY_AUTH_MODE=token), its token must stand in ~/.ray/auth_token here, or in the "
        "file that RAY_AUTH_TOKEN_PATH names; Ray and Python must have the cluster's versions"
    )
