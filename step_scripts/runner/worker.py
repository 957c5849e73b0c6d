"""The driver process of a run: executes requests one after the other in one Ray session.

Forked by `step_scripts.runner.keeper`, which also ends what this process leaves behind. The control descriptor is one
end of a socket pair that carries JSON lines: in `{"request": …, "attempt": …, "pipes": {…}}`, out `{"result": …}` or
`{"error": …}`. `{"prepare": true}` announces a request, and has no answer. The process ends Ray and itself when the
other end closes, on SIGTERM, and when Ray has lost a process that it needs. In the last case it first sends an error
with `"ended": true`, and with `"starting": true` if no step has begun.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext, PipesDefaultContextLoader, PipesDefaultMessageWriter, PipesMappingParamsLoader

from step_scripts.runner.contract import StepRequest
from step_scripts.runner.execution import failure_of, run_step
from step_scripts.runner.ray_environment import use_token_if_present
from step_scripts.runner.ray_session import RaySession, RaySettings

_SHUTDOWN_SECONDS = 3.0
# What later steps import, one module at a time: a request that comes meanwhile waits for one import at most. The names
# are relative, because full names would belong to the code of every step (`step_scripts.runner.code_version`).
_LATER_IMPORTS = (
    "..ingest_features",
    "..prepare_splits",
    "..model.xgboost_native",
    "optuna",
    "ray.tune",
    "..tune_model",
    "..evaluate_model",
)


def answer(message: dict[str, Any], session: RaySession) -> dict[str, Any]:
    """Run the request in `message`; its result or its error as plain data."""
    request = StepRequest.model_validate(message["request"])
    try:
        with PipesContext(
            params_loader=PipesMappingParamsLoader(message["pipes"]),
            context_loader=PipesDefaultContextLoader(),
            message_writer=PipesDefaultMessageWriter(),
        ) as pipes:
            result = run_step(
                request, pipes.log, session, attempt=message["attempt"], waited=message.get("waited", 0.0)
            )
    except Exception as error:  # noqa: BLE001  # the process's boundary: becomes the other side's exception
        failure = failure_of(error)
        if failure["kind"] == "crash" and (loss := session.loss()) is not None:
            failure["message"] = loss
        return {"error": failure}
    return {"result": result.model_dump(mode="json")}


def _end(session: RaySession) -> None:
    """End Ray if that takes no longer than `_SHUTDOWN_SECONDS`, then the process; Ray's own processes follow it."""
    stopper = threading.Thread(target=session.stop, daemon=True)
    stopper.start()
    stopper.join(_SHUTDOWN_SECONDS)
    os._exit(0)


def main(descriptor: int) -> None:
    """Serve requests until the other end closes."""
    channel = socket.socket(fileno=descriptor)
    settings = RaySettings.model_validate_json(os.environ.get("HOUSING_RAY_SETTINGS", "{}"))

    def lost(reason: str) -> None:
        error = {"kind": "crash", "message": reason, "traceback": "see the run's output"}
        with contextlib.suppress(OSError):
            reply = {"error": error, "ended": True, "starting": not session.is_started}
            channel.sendall(json.dumps(reply).encode() + b"\n")
        os._exit(1)

    if settings.address:
        use_token_if_present()  # before anything imports Ray
    session = RaySession(settings, on_loss=lost)
    if folder := os.environ.get("HOUSING_RAY_FOLDER"):
        session.temporary_folder = Path(folder)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_end, args=(session,)).start())
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        with channel.makefile("r", encoding="utf-8") as lines, contextlib.suppress(OSError):
            for line in lines:
                requests.put({**json.loads(line), "received": time.monotonic()})
        _end(session)

    threading.Thread(target=listen, daemon=True).start()
    later, answered = iter(_LATER_IMPORTS), False
    ready = 0.0
    while True:
        while answered and requests.empty() and (module := next(later, None)) is not None:
            importlib.import_module(module, __package__)
        request = requests.get()
        if "prepare" in request:
            # The request would raise the error again; it is reported then.
            with contextlib.suppress(Exception):
                session.ensure()
            ready = time.monotonic()
            continue
        request["waited"] = max(0.0, ready - request["received"])
        channel.sendall(json.dumps(answer(request, session)).encode() + b"\n")
        answered = True
