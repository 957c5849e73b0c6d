"""Serving processes on this machine: starting, finding, asking, ending them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from step_scripts.runner.private_files import open_private
from step_scripts.serving.deployment import DEPLOYMENT_FILE, LOG_FILE, SERVER_FILE, ServerRecord

START_LOG_FILE = "start.log"
_PROJECT = Path(__file__).parents[2]
_POLL_SECONDS = 0.02
_PING_SECONDS = 2.0  # SageMaker's own limit
_REQUEST_SECONDS = 60.0  # also SageMaker's
_CREATE_TIME_TOLERANCE = 0.05  # seconds; psutil derives it from the boot time, which may be adjusted slightly


class ServerUnreachable(RuntimeError):
    """The serving process does not answer, or has ended."""


def find_server(folder: Path) -> ServerRecord | None:
    """The process that serves the state folder, if it is alive. A later process with its pid is not taken for it."""
    try:
        record = ServerRecord.read(folder / SERVER_FILE)
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.create_time) > _CREATE_TIME_TOLERANCE:
            return None
        return record if process.status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
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

    Raises `ServerUnreachable` with the end of its log if it does not start.
    """
    with open_private(folder / START_LOG_FILE, "ab") as log:
        process = subprocess.Popen(
            [*_command(folder), "--until-input-closes"],
            cwd="/",
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield wait_until_serving(folder, timeout_seconds, process)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "step_scripts.serve_model", "--deployment", str(folder / DEPLOYMENT_FILE)]


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PROJECT), *([path] if path else [])])}


def wait_until_serving(
    folder: Path, timeout_seconds: float, process: subprocess.Popen[bytes] | None = None
) -> ServerRecord:
    """Wait until the server of the folder has loaded its model. Raises `ServerUnreachable`."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        record = find_server(folder)
        if record is not None and ping(record) is not None:
            return record
        if process is not None and process.poll() is not None:
            raise ServerUnreachable(f"the server ended with status {process.returncode}")
        failed = folder / START_LOG_FILE
        if process is None and record is None and failed.exists() and b"error: " in failed.read_bytes():
            raise ServerUnreachable("the server did not start")
        time.sleep(_POLL_SECONDS)
    raise ServerUnreachable(f"the server was not ready within {timeout_seconds:g} s")


def ask_to_reload(server: ServerRecord, folder: Path) -> None:
    """Have the server read its deployment file again. Raises `ServerUnreachable` if it has ended."""
    _signal(server, folder, signal.SIGHUP)


def end_server(folder: Path, timeout_seconds: float) -> bool:
    """End the server of the folder after its requests in progress, or by force. False if there was none."""
    server = find_server(folder)
    if server is None:
        return False
    for number, seconds in ((signal.SIGTERM, timeout_seconds), (signal.SIGKILL, 5.0)):
        with suppress(ServerUnreachable):
            _signal(server, folder, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if find_server_process(server) is None:
                (folder / SERVER_FILE).unlink(missing_ok=True)
                return True
            time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"process {server.pid}, which serves {folder}, cannot be ended")


def find_server_process(server: ServerRecord) -> psutil.Process | None:
    """The process itself, if it is the recorded one and alive."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(server.pid)
        same = abs(process.create_time() - server.create_time) <= _CREATE_TIME_TOLERANCE
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _signal(server: ServerRecord, folder: Path, number: signal.Signals) -> None:
    process = find_server_process(server)
    if process is None:
        raise ServerUnreachable(f"the process that served {folder} has ended")
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil compares the creation time once more


def stray_servers(root: Path) -> list[tuple[str, psutil.Process]]:
    """Serving processes of endpoints directly below `root` whose deployment file is gone, with the endpoints' names."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()
            if "step_scripts.serve_model" not in command or "--deployment" not in command[:-1]:
                continue
            file = Path(command[command.index("--deployment") + 1])
            if file.parent.parent == root and not file.exists() and process.status() != psutil.STATUS_ZOMBIE:
                found.append((file.parent.name, process))
    return found


def end_processes(processes: list[psutil.Process], seconds: float = 10.0) -> None:
    """End processes in order, or by force after `seconds`. Those that have ended do not matter."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5.0)


def ping(server: ServerRecord) -> dict[str, Any] | None:
    """What the server says it serves; None if it does not answer, or is still loading."""
    try:
        status, body = _request(server, "GET", "/ping", timeout_seconds=_PING_SECONDS)
        return json.loads(body) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None


def post(
    server: ServerRecord, path: str, body: bytes, content_type: str, accept: str, inference_id: str | None
) -> tuple[int, bytes]:
    """Status and body of the answer. Raises `ServerUnreachable`."""
    headers = {"Content-Type": content_type, "Accept": accept}
    if inference_id:
        headers["X-Amzn-SageMaker-Inference-Id"] = inference_id
    try:
        return _request(server, "POST", path, body, headers, _REQUEST_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        summary = f"{type(error).__name__}: {error}"
        raise ServerUnreachable(f"http://{server.host}:{server.port}{path} does not answer: {summary}") from error


def _request(
    server: ServerRecord,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    timeout_seconds: float = _REQUEST_SECONDS,
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout_seconds)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def log_tail(folder: Path, lines: int = 15) -> str:
    """The last lines of the server's logs."""
    found: list[str] = []
    for name in (LOG_FILE, START_LOG_FILE):
        with suppress(FileNotFoundError):
            found += (folder / name).read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(found[-lines:])
