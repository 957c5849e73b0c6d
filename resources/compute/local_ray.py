"""Steps on Ray on this machine, or on a cluster given by its address.

The Ray driver is a process of its own (`step_scripts.runner.worker`). It runs all steps of a run in one Ray session. If
it crashes, the run's process survives; a termination does not wait for Ray, because the run's main thread only waits
for a pipe. The run starts a small process, the keeper (`step_scripts.runner.processes`), which starts the driver and
ends all of Ray's processes when the driver or the run has ended, for whatever reason.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from pydantic import Field, PrivateAttr

from resources.compute.base import ComputeBackend, failure_of
from resources.inventory import OwnedItem
from resources.pipes_session import pipes_session
from resources.waiting import wait_until
from step_scripts.runner import storage
from step_scripts.runner.contract import StepRequest, StepResult
from step_scripts.runner.processes import end_processes, how_ended
from step_scripts.runner.ray_environment import (
    FOLDER_VARIABLE,
    SessionFolder,
    make_folder,
    processes_of,
    remove_abandoned,
)

_POLL_SECONDS = 0.2
_TERMINATION_SECONDS = 4.0


@dataclass
class _Worker:
    """A keeper and its child, the driver: the keeper's process, this end of the pipe, the session's folder."""

    process: subprocess.Popen[bytes]
    channel: Connection
    folder: SessionFolder

    def is_visible(self) -> bool:
        """Whether others can see that the keeper is there, or that it has ended."""
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).environ())
        return True

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`. If the process has ended, `reply` finds out."""
        with contextlib.suppress(ConnectionError):
            self.channel.send_bytes(json.dumps(message).encode())

    def reply(self) -> dict[str, Any] | None:
        """The next reply; `None` if the process has ended. The main thread can be interrupted while it waits."""
        with contextlib.suppress(EOFError, OSError):  # `OSError`: it has ended without reading all that was sent
            while not self.channel.poll(_POLL_SECONDS):
                pass
            return json.loads(self.channel.recv_bytes())
        return None

    def stop(self) -> None:
        """End the process and all that it started, and remove its folder. Takes at most about 5 seconds.

        A private Ray session holds nothing that anybody needs: its processes are killed, which takes a tenth of the
        second and a half that Ray takes to end them one after the other.
        """
        self.channel.close()  # the keeper ends everything when it sees this
        try:
            self.process.wait(_TERMINATION_SECONDS)
        except subprocess.TimeoutExpired:
            end_processes(processes_of(self.folder.path))
            self.process.poll()
        self.folder.remove()


class LocalRay(ComputeBackend):
    """One Ray session a run, started with the first step that is not answered from the cache."""

    address: str | None = Field(
        default=None, description="Address of an existing Ray cluster. It is used, and never shut down."
    )
    num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs that Ray may use. Empty: all that this process may use."
    )
    object_store_memory: int | None = Field(
        default=None, ge=80 << 20, description="Size of Ray's object store, bytes. Empty: Ray's default."
    )

    _worker: _Worker | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[LocalRay]:
        """End the Ray session with the run, however the run ends."""
        for folder in remove_abandoned():
            dg.get_dagster_logger().info(f"removed {folder}, which a run that was killed had left behind")
        try:
            yield self
        finally:
            self._stop()

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ComputeBackend.inventory`. What is running now are the driver processes of runs."""
        return [*(item for item, _, _ in self._sessions()), *super().inventory()]

    def remove(self, item: OwnedItem) -> None:
        """See `ComputeBackend.remove`. A driver process is ended with all that it started."""
        if item.kind != "job":
            super().remove(item)
            return
        for found, folder, first in self._sessions():
            if found.location == item.location:
                end_processes([first], _TERMINATION_SECONDS)  # a keeper takes all others with it
                end_processes(processes_of(folder))
                shutil.rmtree(folder, ignore_errors=True)

    def _sessions(self) -> Iterator[tuple[OwnedItem, Path, psutil.Process]]:
        """Sessions with this backend's artifacts, of any run, by the environment of their processes.

        Each with its folder and its oldest process: the keeper, if it is alive. It finds what is left of a session even
        if its first process or its folder is gone.
        """
        found: dict[tuple[str, str | None], list[tuple[float, psutil.Process]]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                folder = environment.get(FOLDER_VARIABLE)
                if folder is None or environment.get("HOUSING_ARTIFACTS") != self.artifact_root:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:
                    session = (folder, environment.get("HOUSING_RUN_ID"))
                    found.setdefault(session, []).append((process.create_time(), process))
        for (folder, run_id), processes in found.items():
            started, first = min(processes, key=lambda process: process[0])
            item = OwnedItem(
                kind="job",
                name=f"process {first.pid}",
                location=f"process {first.pid} of {started:.2f}",
                created_at=datetime.fromtimestamp(started, UTC),
                run_id=run_id,
                temporary=True,
                detail="Ray driver",
            )
            yield item, Path(folder), first

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _start(self, run_id: str) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        # Short, because Ray puts sockets below it: a socket's path is limited to 107 bytes.
        folder = make_folder("housing-", parent="/tmp" if Path("/tmp").is_dir() else None)
        environment = os.environ | {
            # `_sessions` finds abandoned processes by these two.
            "HOUSING_ARTIFACTS": self.artifact_root,
            "HOUSING_RUN_ID": run_id,
            "HOUSING_RAY_SETTINGS": self.model_dump_json(include={"address", "num_cpus", "object_store_memory"}),
            FOLDER_VARIABLE: str(folder.path),
            "TMPDIR": str(folder.path),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        environment.pop("RAY_ADDRESS", None)
        if environment.get("PYTHONOPTIMIZE", "") not in ("", "0", "1"):
            environment["PYTHONOPTIMIZE"] = "1"  # Ray cannot start without docstrings
        time_to_end = 0.0 if self.address is None else _TERMINATION_SECONDS - 1.0
        arguments = map(str, (theirs.fileno(), folder.lock, time_to_end))
        keeper = [sys.executable, "-m", "step_scripts.runner.processes", *arguments]
        try:
            with theirs:
                process = subprocess.Popen(
                    keeper,
                    pass_fds=[theirs.fileno(), folder.lock],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the run alone, which then ends this process in order
                )
            worker = _Worker(process, ours, folder)
            # `_sessions` looks at its environment, which the system shows an instant after a program has been started.
            wait_until(worker.is_visible, timeout=5.0, interval=0.005, what=f"the start of process {process.pid}")
        except BaseException:
            ours.close()  # a keeper that has been started ends when it sees this
            folder.remove()
            raise
        return worker

    def prepare(self, context: dg.AssetExecutionContext) -> None:
        """Start Ray now if there is no earlier result that could make it unnecessary."""
        if self._worker is None and not (self.use_cache and storage.exists(self.artifact_root)):
            self._worker = self._start(context.run.run_id)
            self._worker.send({"prepare": True})

    def _execute(self, context: dg.AssetExecutionContext, request: StepRequest) -> StepResult:
        reply = self._reply(context, request)
        if reply.get("starting"):  # on a very busy machine Ray's processes time out waiting for each other
            context.log.warning(f"{reply['error']['message']}, while Ray was being started. Starting it once more")
            reply = self._reply(context, request)
        if "error" in reply:
            raise failure_of(request.step, reply["error"])
        return StepResult.model_validate(reply["result"])

    def _reply(self, context: dg.AssetExecutionContext, request: StepRequest) -> dict[str, Any]:
        """The driver's answer (see `step_scripts.runner.worker` for its keys), or an error if the driver has ended.

        If it has ended, its other processes and the outputs of this attempt are removed.
        """
        attempt = uuid.uuid4().hex[:12]
        goes_on = False
        try:
            if self._worker is None:
                self._worker = self._start(context.run.run_id)
            with pipes_session(
                context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
            ) as session:
                pipes = session.get_bootstrap_env_vars()
                self._worker.send({"request": request.model_dump(mode="json"), "attempt": attempt, "pipes": pipes})
                reply = self._worker.reply()
            if reply is None:
                error = {"kind": "crash", "message": self._how_it_ended(), "traceback": "see the run's output"}
                reply = {"error": error, "ended": True}
            goes_on = not reply.get("ended")
            return reply
        finally:
            # Any way out but the normal one (termination above all): nothing may go on running behind the run's back.
            if not goes_on:
                self._stop()
                storage.delete_folder(storage.join(request.output_uri, attempt))

    def _how_it_ended(self) -> str:
        assert self._worker is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.process.wait(1.0)
        status = self._worker.process.returncode
        return f"the Ray driver process {'has ended' if status is None else how_ended(status)}"
