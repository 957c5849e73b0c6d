"""The process that runs steps, as the driver of a Ray session: one after the other on a laptop, one in a job.

Forked by the keeper (`step_scripts.runner.processes`), or started by the head of a job (`step_scripts.cluster.head`).
They end what this process leaves behind. The control descriptor is one end of a `multiprocessing.Pipe` that carries
JSON:

- `{"request": …, "attempt": …, "pipes": {…}}` runs a step. The answer is `{"result": …}` or `{"error": …}`. With the
  `"address"` of a cluster it runs there, after `"note"` was logged, and the process ends with the step.
- `{"prepare": true}` announces a request, and has no answer.
- `{"warning": …}` is passed on to Dagster while a step runs.

The process ends Ray and itself when the other end closes. It ends when Ray has not come up, or lost a process that it
needs; then it first sends an error with `"ended": true`, and with `"starting": true` if no step has begun. On SIGTERM
the step saves what it can (see `step_scripts.runner.processes`), and the process ends with status 143. The Pipes
session is not closed then: the step may go on in the job's next attempt.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import dagster_pipes

from step_scripts.runner import storage
from step_scripts.runner.contract import Reporter, StepRequest
from step_scripts.runner.execution import PrintReporter, failure_of, run_step
from step_scripts.runner.processes import StopSignal, interrupt
from step_scripts.runner.ray_environment import SessionFolder, use_token_if_present
from step_scripts.runner.ray_session import RayNotStarted, RaySession, RaySettings
from step_scripts.runner.storage import service_client

_SHUTDOWN_SECONDS = 3.0
_MESSAGES_SECONDS = 1.0
# What later steps import, one module at a time: a request that comes meanwhile waits for one import at most. The names
# are relative, because full names would belong to the code of every step (`step_scripts.runner.code_version`).
_LATER_IMPORTS = (
    "..ingest_features",
    "..prepare_splits",
    "..model",
    "optuna",
    "ray.tune",
    "..tune_model",
    "..evaluate_model",
)


class _Messages(dagster_pipes.PipesS3MessageWriter):
    """Numbers its chunks after those that an earlier attempt of the same job has left, instead of replacing them."""

    def make_channel(self, params: dagster_pipes.PipesParams) -> dagster_pipes.PipesS3MessageWriterChannel:
        channel = super().make_channel(params)
        written = storage.list_details(storage.join(f"s3://{params['bucket']}", params["key_prefix"]))
        numbers = [int(name) for path, _, _ in written if (name := path.partition(".")[0]).isdigit()]
        channel._counter = max(numbers, default=0) + 1  # the writer has no option for its first number
        return channel


class _Driver:
    """Runs steps in a thread, so that the main thread is free for signals and for the control descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._channel = Connection(descriptor)
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reporter: Reporter = PrintReporter()
        self._stopping = False
        settings = RaySettings.model_validate_json(os.environ.get("HOUSING_RAY_SETTINGS", "{}"))
        if settings.address:
            use_token_if_present()  # before anything imports Ray
        self._session = RaySession(settings)
        if folder := os.environ.get("HOUSING_RAY_FOLDER"):
            self._session.folder = SessionFolder(Path(folder))

    def listen(self) -> None:
        """Take requests until the other end closes. Ends the process on SIGTERM, and when Ray's processes end."""
        signals = StopSignal()
        threading.Thread(target=self._work, name="step", daemon=True).start()
        while True:
            readable = signals.wait(None, self._channel.fileno(), select.POLLIN)
            if signals.stop_requested:
                self._stop()
            if (reason := self._session.loss()) is not None:
                self._lost(reason)
            if readable:
                try:
                    message = json.loads(self._channel.recv_bytes())
                except (EOFError, OSError):
                    break
                if "warning" in message:
                    self._reporter.warning(message["warning"])
                else:
                    self._requests.put({**message, "received": time.monotonic()})
        stopper = threading.Thread(target=self._session.stop, daemon=True)
        stopper.start()
        stopper.join(_SHUTDOWN_SECONDS)
        _exit(0)  # Ray's own processes follow it

    def _work(self) -> None:
        try:
            self._run_requests()
        except BaseException:  # noqa: BLE001  # without this thread the process would answer nobody
            traceback.print_exc()
            _exit(1)

    def _run_requests(self) -> None:
        later, answered, ready = iter(_LATER_IMPORTS), False, 0.0
        while True:
            while answered and self._requests.empty() and (module := next(later, None)) is not None:
                importlib.import_module(module, __package__)
            message = self._requests.get()
            if "prepare" in message:
                try:
                    self._session.ensure()
                except RayNotStarted as error:
                    self._lost(str(error))
                except Exception:  # noqa: BLE001, S110  # the request raises it again; it is reported then
                    pass
                ready = time.monotonic()
                continue
            answer = self._answer(message, waited=max(0.0, ready - message["received"]))
            if self._stopping:  # the main thread ends the process; an error is that of an interrupted step
                return
            self._send(answer)
            if "address" in message:
                _exit(1 if "error" in answer else 0)
            answered = True

    def _answer(self, message: dict[str, Any], waited: float) -> dict[str, Any]:
        """Run a request; its result or its error as plain data."""
        failure: dict[str, Any] | None = None
        try:
            request = StepRequest.model_validate(message["request"])
            if address := message.get("address"):
                self._session.settings = RaySettings(address=address, ship_code=False)
            with self._reporting(message["pipes"]) as pipes:
                if note := message.get("note"):
                    self._reporter.info(note)
                try:
                    result = run_step(request, self._reporter, self._session, attempt=message["attempt"], waited=waited)
                except Exception as error:
                    failure = self._failure_of(error)
                    if pipes is not None:
                        pipes.report_custom_message({"step_error": failure})
                    raise
        except RayNotStarted as error:
            self._lost(str(error))
        except BaseException as error:  # noqa: BLE001  # the process's boundary; also of a step that calls sys.exit
            return {"error": failure or self._failure_of(error)}
        return {"result": result.model_dump(mode="json")}

    def _failure_of(self, error: BaseException) -> dict[str, Any]:
        failure = failure_of(error)
        if failure["kind"] == "crash" and (loss := self._session.loss()) is not None:
            failure["message"] = loss
        return failure

    @contextmanager
    def _reporting(self, bootstrap: dict[str, str] | None) -> Iterator[dagster_pipes.PipesContext | None]:
        """Dagster's Pipes session, if there is one: its log is where messages go."""
        if bootstrap is None:
            yield None
            return
        params = dagster_pipes.PipesMappingParamsLoader(bootstrap)
        loader: dagster_pipes.PipesContextLoader = dagster_pipes.PipesDefaultContextLoader()
        writer: dagster_pipes.PipesMessageWriter[Any] = dagster_pipes.PipesDefaultMessageWriter()
        if "bucket" in params.load_context_params():
            loader = dagster_pipes.PipesS3ContextLoader(service_client("s3"))
        if "bucket" in params.load_messages_params():
            writer = _Messages(service_client("s3"), interval=_MESSAGES_SECONDS)  # its thread ends at the first error
        with dagster_pipes.PipesContext(params_loader=params, context_loader=loader, message_writer=writer) as pipes:
            self._reporter = pipes.log
            try:
                yield pipes
            finally:
                self._reporter = PrintReporter()

    def _send(self, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._channel.send_bytes(json.dumps(answer, default=str).encode())

    def _lost(self, reason: str) -> NoReturn:
        error = {"kind": "crash", "message": reason, "traceback": "see the run's output"}
        self._send({"error": error, "ended": True, "starting": not self._session.is_started})
        os._exit(1)

    def _stop(self) -> None:
        """Let the step save its work, then end the process."""
        self._stopping = True
        self._reporter.warning("the step is being stopped, or its machine is taken away: saving unfinished work")
        for error in interrupt():
            self._reporter.warning(f"work could not be saved: {type(error).__name__}: {error}")
        _exit(128 + signal.SIGTERM)


def _exit(status: int) -> None:
    """End at once: Ray's and other libraries' threads are not waited for."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(descriptor: int) -> None:
    """Serve requests until the other end closes."""
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that it cannot handle SIGTERM
    _Driver(descriptor).listen()


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    import ray  # noqa: F401  # while the cluster forms

    main(int(sys.argv[1]))
