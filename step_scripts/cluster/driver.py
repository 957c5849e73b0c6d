"""The process on the head that runs the step, as the driver of the cluster. Started by `step_scripts.cluster` only.

Standard input carries JSON lines. The first is a `DriverTask`. While the cluster forms, the process imports what it
needs. The line `{"address": …, "note": …}` starts the step; `{"warning": …}` is passed on to Dagster; the end of the
input ends the process. How the step ended is written to the file `DriverTask.outcome`: `{"failure": null}`, or the
failure as `step_scripts.cluster.job` describes it.

SIGTERM: the step saves what it can (see `step_scripts.runner.processes`), then the process ends with status 143.
The failure is reported to Dagster, but the Pipes session is not closed: the step may go on in the job's next attempt.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dagster_pipes import (
    PipesContext,
    PipesContextLoader,
    PipesDefaultContextLoader,
    PipesDefaultMessageWriter,
    PipesMappingParamsLoader,
    PipesMessageWriter,
    PipesParams,
    PipesS3ContextLoader,
    PipesS3MessageWriter,
    PipesS3MessageWriterChannel,
)
from pydantic import BaseModel

from step_scripts.cluster.job import STOPPED, failure_of
from step_scripts.runner import storage
from step_scripts.runner.contract import Reporter, StepRequest
from step_scripts.runner.execution import PrintReporter, run_step
from step_scripts.runner.processes import interrupt
from step_scripts.runner.ray_session import RaySession, RaySettings

_MESSAGES_SECONDS = 1.0
_log = logging.getLogger(__name__)


class DriverTask(BaseModel):
    """What the driver is to do."""

    request: StepRequest
    attempt: str
    pipes: dict[str, str] | None
    outcome: Path


class _Messages(PipesS3MessageWriter):
    """Numbers its chunks after those that an earlier attempt of the same job has left, instead of replacing them."""

    def make_channel(self, params: PipesParams) -> PipesS3MessageWriterChannel:
        channel = super().make_channel(params)
        numbers = [0]
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=params["bucket"], Prefix=params.get("key_prefix") or ""):
            names = (item["Key"].rpartition("/")[2].partition(".")[0] for item in page.get("Contents", []))
            numbers += [int(name) for name in names if name.isdigit()]
        channel._counter = max(numbers) + 1  # the writer has no option for its first number
        return channel


class Driver:
    """One step, run in a thread, so that the main thread is free for signals and standard input."""

    def __init__(self, task: DriverTask) -> None:
        self._task = task
        self._reporter: Reporter = PrintReporter()
        self._stopping = False

    def start(self, address: str, note: str) -> None:
        """Start the step on the cluster at `address`."""
        threading.Thread(target=self._run, args=(address, note), name="step").start()

    def warn(self, message: str) -> None:
        """Pass a warning on."""
        self._reporter.warning(message)

    def stop(self, *_: int | FrameType | None) -> None:
        """Let the step save its work, then end the process. The handler of SIGTERM."""
        if self._stopping:
            return
        self._stopping = True
        self._reporter.warning("the job is being stopped, or its machine is taken away: saving unfinished work")
        for error in interrupt():
            _log.error("work could not be saved: %s: %s", type(error).__name__, error)
        _exit(STOPPED)

    def _run(self, address: str, note: str) -> None:
        failure: dict[str, Any] | None = None
        try:
            with self._reporting() as pipes:
                try:
                    self._reporter.info(note)
                    session = RaySession(RaySettings(address=address, ship_code=False))
                    run_step(self._task.request, self._reporter, session, attempt=self._task.attempt)
                except Exception as error:
                    failure = failure_of(error)
                    if pipes is not None:
                        pipes.report_custom_message({"step_error": failure})
                    raise
        except BaseException as error:  # noqa: BLE001  # becomes the job's failure: also that of sys.exit in a step
            failure = failure or failure_of(error)
        if self._stopping:  # the main thread ends the process; the step's errors are those of an interrupted step
            return
        storage.write_bytes(str(self._task.outcome), json.dumps({"failure": failure}, default=str).encode())
        _exit(0 if failure is None else 1)

    @contextmanager
    def _reporting(self) -> Iterator[PipesContext | None]:
        if self._task.pipes is None:
            yield None
            return
        params = PipesMappingParamsLoader(self._task.pipes)
        loader: PipesContextLoader = PipesDefaultContextLoader()
        writer: PipesMessageWriter[Any] = PipesDefaultMessageWriter()
        if "bucket" in params.load_context_params():
            loader = PipesS3ContextLoader(_s3_client())
        if "bucket" in params.load_messages_params():
            writer = _Messages(_s3_client(), interval=_MESSAGES_SECONDS)
        with PipesContext(params_loader=params, context_loader=loader, message_writer=writer) as pipes:
            self._reporter = pipes.log
            yield pipes


def _s3_client() -> Any:
    import boto3
    from botocore.config import Config

    # The writer's thread ends at the first error.
    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 10}))


def _exit(status: int) -> None:
    """End at once: Ray's and other libraries' threads are not waited for; the supervisor ends all that is left."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Follow standard input to its end."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that it cannot handle SIGTERM
    driver = Driver(DriverTask.model_validate_json(sys.stdin.readline()))
    signal.signal(signal.SIGTERM, driver.stop)
    import ray  # noqa: F401  # while the cluster forms

    for line in sys.stdin:
        message = json.loads(line)
        if "address" in message:
            driver.start(message["address"], message["note"])
        else:
            driver.warn(message["warning"])
    _exit(1)  # the supervisor is gone


if __name__ == "__main__":
    main()
