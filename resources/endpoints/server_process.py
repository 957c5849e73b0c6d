"""Serving processes on this machine: starting, finding, asking, ending them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from resources.endpoints.base import InvocationFailed
from resources.waiting import wait_until
from step_scripts.runner.local_files import open_private
from step_scripts.runner.processes import end_processes, lives
from step_scripts.serving.deployment import (
    DEPLOYMENT_FILE,
    LOG_FILE,
    SERVER_FILE,
    DeploymentRecord,
    ServerRecord,
)

START_LOG_FILE = "start.log"
_PROJECT = Path(__file__).parents[2]
_POLL_SECONDS = 0.02
_PING_SECONDS = 2.0  # SageMaker's own limit
_REQUEST_SECONDS = 60.0  # also SageMaker's
_CREATE_TIME_TOLERANCE = 0.05  # seconds; psutil derives it from the boot time, which may be adjusted slightly


class ServerUnreachable(RuntimeError):
    """The serving process does not answer, or has ended."""


def find_server(folder: Path) -> ServerRecord | None:
    """What the process that serves the state folder has recorded, if it is alive."""
    with suppress(FileNotFoundError, ValueError):
        record = ServerRecord.read(folder / SERVER_FILE)
        return record if find_process(record) is not None else None
    return None


def start_detached(folder: Path) -> None:
    """Start a server for the state folder that outlives this process and is not its child.

    It runs in a session of its own, so neither Ctrl-C nor the end of a Dagster run reaches it.
    """
    (folder / START_LOG_FILE).unlink(missing_ok=True)
    # Appending: the server cuts the file off when it grows too large.
    command = ['umask 077; exec "$0" "$@" >>"$LOG" 2>&1 </dev/null &', *_command(folder)]
    environment = {**_environment(), "LOG": str(folder / START_LOG_FILE)}
    subprocess.run(
        ["/bin/sh", "-c", *command], cwd="/", env=environment, start_new_session=True, check=True, timeout=30
    )


@contextmanager
def candidate(folder: Path, timeout_seconds: float) -> Iterator[ServerRecord]:
    """A server for the state folder, up to the end of the block. It also ends when this process does.

    Raises `ServerUnreachable` if it does not start, `TimeoutError`.
    """
    command = [*_command(folder), "--until-input-closes"]
    with (
        open_private(folder / START_LOG_FILE, "ab") as log,
        psutil.Popen(
            command, cwd="/", env=_environment(), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            yield wait_until_serving(folder, timeout_seconds, process=process)
        finally:
            end_processes([process], 5.0)


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "step_scripts.serve_model", "--deployment", str(folder / DEPLOYMENT_FILE)]


def _environment() -> dict[str, str]:
    path = [str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def wait_until_serving(
    folder: Path,
    timeout_seconds: float,
    *,
    process: psutil.Popen | None = None,
    changing: ServerRecord | None = None,
) -> ServerRecord:
    """Wait until a server of the folder serves its deployment: `process`, if given, or `changing`, which ran before.

    Raises `ServerUnreachable` if it does not start, ends, or refuses the deployment, `TimeoutError`.
    """
    wanted = DeploymentRecord.read(folder / DEPLOYMENT_FILE).deployment_id

    def serving() -> ServerRecord | None:
        server = find_server(folder)
        served = (ping(server) if server else None) or {}
        if served.get("deployment_id") == wanted:
            return server
        if (refused := served.get("refused", {})).get("deployment_id") == wanted:
            raise ServerUnreachable(f"the server refused the model: {refused['error']}")
        if process is not None and process.poll() is not None:
            raise ServerUnreachable(f"the server ended with status {process.returncode}")
        if server is None and changing is not None:
            raise ServerUnreachable("the server ended while it changed to the new model")
        log = folder / START_LOG_FILE
        if server is None and process is None and log.exists() and b"error: " in log.read_bytes():
            raise ServerUnreachable("the server did not start")
        return None

    what = "the start of the server" if changing is None else "the change to the new model"
    return wait_until(serving, timeout=timeout_seconds, interval=_POLL_SECONDS, what=what)


def reload_server(server: ServerRecord) -> None:
    """Have the server read its deployment file again, unless it has ended."""
    if process := find_process(server):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGHUP)  # psutil compares the creation time once more


def end_server(folder: Path, timeout_seconds: float) -> bool:
    """End the server of the folder after its requests in progress, or by force. False if there was none.

    Raises `TimeoutError` if even that does not help.
    """
    if (server := find_server(folder)) is None or (process := find_process(server)) is None:
        return False
    end_processes([process], timeout_seconds)
    if lives(process):
        raise TimeoutError(f"process {process.pid} cannot be ended")
    (folder / SERVER_FILE).unlink(missing_ok=True)
    return True


def find_process(server: ServerRecord) -> psutil.Process | None:
    """The recorded process, if it is alive. A later process with its pid is not taken for it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(server.pid)
        if abs(process.create_time() - server.create_time) <= _CREATE_TIME_TOLERANCE and lives(process):
            return process
    return None


def orphan_servers(root: Path) -> list[tuple[str, psutil.Process]]:
    """Serving processes of endpoints directly below `root` whose deployment file is gone, with the endpoints' names."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []  # None: another user's process
        if "step_scripts.serve_model" in command and "--deployment" in command[:-1]:
            file = Path(command[command.index("--deployment") + 1])
            if file.parent.parent == root and not file.exists() and lives(process):
                found.append((file.parent.name, process))
    return found


def ping(server: ServerRecord) -> dict[str, Any] | None:
    """What the server says it serves; None if it does not answer, or is still loading."""
    try:
        status, body = _request(server, "GET", "/ping", None, {}, _PING_SECONDS)
        return json.loads(body) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None


def invoke_server(
    server: ServerRecord, name: str, body: bytes, content_type: str, accept: str, inference_id: str
) -> bytes:
    """The answer to a request. Raises `InvocationFailed`, also if the server does not answer."""
    headers = {"Content-Type": content_type, "Accept": accept}
    if inference_id:
        headers["X-Amzn-SageMaker-Inference-Id"] = inference_id
    try:
        status, answer = _request(server, "POST", "/invocations", body, headers, _REQUEST_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        reason = f"http://{server.host}:{server.port} does not answer: {type(error).__name__}: {error}"
        raise InvocationFailed(f"endpoint {name}: {reason}", status=503, body=b"") from error
    if status != 200:
        text = answer.decode(errors="replace")[:2000]
        raise InvocationFailed(f"endpoint {name} answered {status}: {text}", status=status, body=answer)
    return answer


def _request(
    server: ServerRecord, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_seconds: float
) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=timeout_seconds)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def log_tail(folder: Path, lines: int = 15) -> str:
    """The last lines of the server's logs."""
    found: list[str] = []
    for name in (LOG_FILE, START_LOG_FILE):
        with suppress(FileNotFoundError):
            found += (folder / name).read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(found[-lines:])
