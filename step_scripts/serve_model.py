"""Serves one model over HTTP.

As the local endpoint: `python -m step_scripts.serve_model --deployment <state folder>/deployment.json`. SIGHUP makes
it read that file again, load the model it names beside the old one, and change over; if that fails, the old model stays
and `/ping` says why. As a SageMaker container: `python -m step_scripts.serve_model serve`, where the environment
says what is served: `HOUSING_MODEL_VERSION`, and `HOUSING_MODEL_DIGEST`, which the model is checked against. SIGTERM
ends it after the requests it has accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import logging.handlers
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import uvicorn
import uvloop

from step_scripts.runner.contract import DamagedArtifactError
from step_scripts.runner.local_files import NoLocks, try_lock
from step_scripts.serving.app import InferenceApp, RequestProtocol
from step_scripts.serving.deployment import (
    CAPTURE_FOLDER,
    DEPLOYMENT_FILE,
    LOCK_FILE,
    LOG_FILE,
    SERVER_FILE,
    DeploymentRecord,
    RequestCapture,
    ServerRecord,
)
from step_scripts.serving.served_model import container_record, load_served_model

_GRACE_SECONDS = 25  # SageMaker kills a container 30 s after SIGTERM
_KEEP_ALIVE_SECONDS = 75
_LOG_BYTES, _LOG_FILES = 1 << 20, 2
_OUTPUT_SECONDS = 1.0
_STANDARD_INPUT = 0

logger = logging.getLogger("housing.serving")


class StartError(Exception):
    """The server cannot start; the message says why."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise the signal again at the end, and the exit status would not be 0


class ModelServer:
    """One serving process: a listening socket, an application, and the deployment it follows."""

    def __init__(self, record: DeploymentRecord, state: Path | None) -> None:
        self.record = record
        self.state = state
        self.app = InferenceApp()
        self._reload = asyncio.Event()
        self._failure = ""

    async def serve(self, until_input_closes: bool = False) -> None:
        """Listen, load, serve until SIGTERM or SIGINT. Raises `StartError`."""
        listening = bind(self.record)
        host, port = listening.getsockname()[:2]
        config = uvicorn.Config(
            self.app,
            http=RequestProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        server = _Server(config)

        loop = asyncio.get_running_loop()

        def stop() -> None:
            server.should_exit = True
            loop.remove_reader(_STANDARD_INPUT)

        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(signal.SIGINT, stop)
        if self.state is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        if until_input_closes:
            loop.add_reader(_STANDARD_INPUT, stop)  # nobody writes there: it can be read when it is closed
        tasks = [asyncio.create_task(work) for work in (self._follow(stop), self._bound_output())]
        if self.state is not None:
            created, now = psutil.Process().create_time(), datetime.now(UTC)
            process = ServerRecord(pid=os.getpid(), create_time=created, host=host, port=port, started_at=now)
            process.write(self.state / SERVER_FILE)
        logger.info("listening on http://%s:%d", host, port)
        try:
            await server.serve(sockets=[listening])
        finally:
            for task in tasks:
                task.cancel()
            if self.app.capture is not None:
                self.app.capture.close()
            if self.state is not None:
                (self.state / SERVER_FILE).unlink(missing_ok=True)
        if self._failure:
            raise StartError(self._failure)
        logger.info("stopped")

    async def _follow(self, stop: Callable[[], None]) -> None:
        """Load the model, and at each SIGHUP change to the deployment that the file then describes."""
        self._failure = await self._load(self.record)
        if self._failure:
            stop()
        while self.state is not None:
            await self._reload.wait()
            self._reload.clear()
            try:
                record = DeploymentRecord.read(self.state / DEPLOYMENT_FILE)
            except (OSError, ValueError) as error:
                logger.error("the deployment file cannot be read, %s keeps serving: %s", self.record.version, error)
                continue
            error = await self._load(record)
            if error:
                logger.error("%s was not deployed, %s keeps serving: %s", record.version, self.record.version, error)
            else:
                self.record = record
            self.app.refused = {"deployment_id": record.deployment_id, "error": error} if error else None

    async def _bound_output(self) -> None:
        """Keep the file that standard error goes to bounded: libraries write there, a native one with each panic."""
        while self.state is not None:
            output = os.fstat(2)
            if stat.S_ISREG(output.st_mode) and output.st_size > _LOG_BYTES:
                os.ftruncate(2, 0)
                os.write(2, b"[what stood here was removed: the file had grown too large]\n")
            await asyncio.sleep(_OUTPUT_SECONDS)

    async def _load(self, record: DeploymentRecord) -> str:
        """Load the model of `record` in a thread and serve it from then on. Returns why that failed, or nothing."""
        try:
            self.app.model = await asyncio.to_thread(load_served_model, record)
        except (DamagedArtifactError, OSError) as error:
            return str(error)
        await self._capture_as(record)
        logger.info("serving %s, model %s, as %s", record.version, record.model.digest[:12], record.endpoint_name)
        return ""

    async def _capture_as(self, record: DeploymentRecord) -> None:
        """Capture requests as the deployment says; a capture that is wanted already goes on."""
        current = self.app.capture
        if self.state is None or record.capture == (current and current.settings):
            return
        self.app.capture = None
        if current is not None:
            await asyncio.to_thread(current.close)
        if record.capture is not None:
            self.app.capture = RequestCapture(self.state / CAPTURE_FOLDER, record.capture)


def bind(record: DeploymentRecord) -> socket.socket:
    """A listening socket: on any free port if that of the record is in use and not required. Raises `StartError`."""
    family = socket.AF_INET6 if ":" in record.host else socket.AF_INET
    try:  # listening before the state is recorded: from then on connections succeed
        return socket.create_server((record.host, record.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES) and record.port and not record.port_is_required:
            return bind(record.model_copy(update={"port": 0}))
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"port {record.port} of {record.host} cannot be used ({reason}); choose another") from error


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)


def serve_deployment(path: Path, until_input_closes: bool) -> None:
    """Serve what the file describes; its folder is the state folder. Raises `StartError`, `NoLocks`."""
    try:
        record = DeploymentRecord.read(path)
    except (OSError, ValueError) as error:
        raise StartError(f"{path} cannot be read: {error}") from error
    os.umask(0o077)  # whatever this process writes is for its user alone
    with (path.parent / LOCK_FILE).open("a") as lock:
        if not try_lock(lock.fileno(), path.parent / LOCK_FILE):
            raise StartError(f"another process serves {path.parent}")
        log = path.parent / LOG_FILE
        _log_to(logging.handlers.RotatingFileHandler(log, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES))
        _run(ModelServer(record, path.parent), until_input_closes)


def _run(server: ModelServer, until_input_closes: bool = False) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(until_input_closes))


def main(arguments: list[str]) -> int:
    """Serve until told to stop. Returns the exit status: 0 after SIGTERM, 1 with a message if it cannot start."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is handled; its default action would end the process
    parser = argparse.ArgumentParser(prog="serve_model", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["serve"], help="as SageMaker starts a container")
    parser.add_argument("--deployment", type=Path, help="deployment.json in the state folder of an endpoint")
    parser.add_argument("--until-input-closes", action="store_true", help="also stop at the end of standard input")
    folder = f"{os.environ.get('SAGEMAKER_BASE_DIR', '/opt/ml')}/model"
    port = os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080")
    parser.add_argument("--model-dir", default=folder, help="folder of the model artifact (%(default)s)")
    parser.add_argument("--endpoint-name", default="model", help="name in /endpoints/<name>/invocations")
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 with `serve`, else 127.0.0.1")
    parser.add_argument("--port", type=int, default=port, help="port, 0 for any free one (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.deployment is not None:
            serve_deployment(options.deployment.absolute(), options.until_input_closes)
            return 0
        _log_to(logging.StreamHandler())
        host = options.host or ("0.0.0.0" if options.command else "127.0.0.1")
        address = {"host": host, "port": options.port, "port_is_required": True}
        record = container_record(options.model_dir, options.endpoint_name).model_copy(update=address)
        _run(ModelServer(record, None), options.until_input_closes)
    except (StartError, NoLocks, DamagedArtifactError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
