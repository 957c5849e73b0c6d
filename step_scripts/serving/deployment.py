"""The state folder of an endpoint, through which its host and its serving process talk. Imports nothing heavy.

It holds `deployment.json` (what is to be served; written by the host), `server.json` (the process that serves; written
by it once it listens), `server.log` (bounded), `server.lock` (held by the process as long as it lives) and `captured/`.

There are captured requests, in SageMaker's form: JSON lines in files `<variant>/YYYY/MM/DD/HH/*.jsonl` (UTC). The
process keeps a sample, bounded in size: a thread writes it, so that answering never waits for a disk. What it cannot
keep up with is dropped and counted; when the files are larger than the bound together, the oldest are removed.
`resources.endpoints.captured_files` reads them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FrozenModel
from step_scripts.runner.local_files import open_private, private_folder

DEPLOYMENT_FILE = "deployment.json"
SERVER_FILE = "server.json"
LOG_FILE = "server.log"
LOCK_FILE = "server.lock"
CAPTURE_FOLDER = "captured"
MAX_BODY_BYTES = 6_291_456  # of a request; SageMaker's limit
CSV, JSON, JSON_LINES = "text/csv", "application/json", "application/jsonlines"

_VARIANT = "AllTraffic"
_WAITING_BYTES = 32 << 20
_REQUEST_BYTES = 1600  # that a waiting request takes beside its bodies
_FILES = 8  # that the bound is made of, at least
_FILE_BYTES = 16 << 20
_CLOSE_SECONDS = 5.0

logger = logging.getLogger("housing.serving")


class _StateFile(FrozenModel):
    @classmethod
    def read(cls, path: Path) -> Self:
        """From the file. Raises `FileNotFoundError`, or pydantic's `ValidationError` (a `ValueError`)."""
        return cls.model_validate_json(path.read_bytes())

    def write(self, path: Path) -> None:
        """To the file, atomically. What is not set is left out: a running process may know fewer fields."""
        storage.write_bytes(str(path), self.model_dump_json(indent=2, exclude_none=True).encode())


class CaptureSettings(FrozenModel):
    """Which share of the requests is kept, and how much of them."""

    sampling_percentage: float = Field(default=100.0, gt=0, le=100)
    megabytes: float = Field(default=100.0, gt=0, description="Bound of all files; the oldest are removed.")


class CaptureCounts(BaseModel):
    """Requests of the sample since the process began to capture. `error`: why the last one could not be written."""

    model_config = ConfigDict(frozen=True)

    written: int
    dropped: int
    error: str = ""


class DeploymentRecord(_StateFile):
    """What an endpoint is to serve. `deployment_id` is new for every deployment, also of the same version."""

    deployment_id: str
    endpoint_name: str
    version: str = Field(description="`<model group>/<version>`.")
    model: Artifact
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0: any free port.")
    port_is_required: bool = Field(default=False, description="False: take a free port if `port` is in use.")
    deployed_at: datetime
    previous_version: str | None = None
    capture: CaptureSettings | None = Field(default=None, description="None: requests are not captured.")


class ServerRecord(_StateFile):
    """The serving process. Its `create_time` (psutil: seconds since 1970) tells it from a later process of its pid."""

    pid: int
    create_time: float
    host: str
    port: int
    started_at: datetime


class AnsweredRequest(NamedTuple):
    """A request, without its Content-Encoding, and its answer, each with its media type. `at`: when it was answered."""

    at: datetime
    input_type: str
    input_body: bytes
    output_type: str
    output_body: bytes
    inference_id: str = ""


class RequestCapture:
    """Writes a sample of requests below `folder`, in a thread of its own, until it is closed."""

    def __init__(self, folder: Path, settings: CaptureSettings) -> None:
        self.settings = settings
        self._files = _BoundedFiles(folder / _VARIANT, int(settings.megabytes * 1e6))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="capture")
        self._lock = threading.Lock()
        self._waiting_bytes = self._written = self._dropped = 0
        self._closed = False
        self._error = ""

    def add(self, request: AnsweredRequest) -> None:
        """Take the request if it falls into the sample. Never waits for the disk, never fails."""
        if random.random() * 100 >= self.settings.sampling_percentage:
            return
        size = len(request.input_body) + len(request.output_body) + _REQUEST_BYTES
        with self._lock:  # the thread holds it for microseconds
            if self._closed or self._waiting_bytes + size > _WAITING_BYTES:
                self._dropped += 1
                return
            self._waiting_bytes += size
            self._thread.submit(self._write, request, size)

    def counts(self) -> CaptureCounts:
        """What has become of the requests of the sample since the capture began."""
        return CaptureCounts(written=self._written, dropped=self._dropped, error=self._error)

    def close(self) -> None:
        """Write what waits, for some seconds at most, and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(TimeoutError):
            self._thread.submit(self._files.close).result(_CLOSE_SECONDS)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(self, request: AnsweredRequest, size: int) -> None:
        with self._lock:
            self._waiting_bytes -= size
        try:
            self._files.write(request.at, captured_line(request))
            self._written += 1
            self._error = ""
        except (OSError, ValueError) as error:  # ValueError: larger than the bound
            if not self._error:
                logger.error("requests cannot be captured: %s", error)
            self._error = str(error)
            with self._lock:
                self._dropped += 1


def captured_line(request: AnsweredRequest) -> bytes:
    """One line of SageMaker's captured data."""
    # SageMaker's times are whole seconds; finer ones tell the requests before a change of model from those after it.
    metadata = {"eventId": str(uuid.uuid4()), "inferenceTime": request.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    if request.inference_id:
        metadata["inferenceId"] = request.inference_id
    data = {
        f"endpoint{side}": {
            "observedContentType": media,
            "mode": side.upper(),
            "data": body.decode(errors="replace"),
            "encoding": "CSV" if media == CSV else "JSON",
        }
        for side, media, body in (("Input", *request[1:3]), ("Output", *request[3:5]))
    }
    return json.dumps({"captureData": data, "eventMetadata": metadata, "eventVersion": "0"}).encode() + b"\n"


class _BoundedFiles:
    """Files of an hour each at most, the oldest of which make room for new ones. For one thread."""

    def __init__(self, folder: Path, bound: int) -> None:
        self._folder, self._bound = folder, bound
        self._file_bytes = min(bound // _FILES, _FILE_BYTES)
        self._file: IO[bytes] | None = None
        self._path = folder
        with contextlib.suppress(OSError):  # there is none yet
            folder.parent.chmod(0o700)  # an earlier version made it for all to read

    def write(self, at: datetime, line: bytes) -> None:
        """Append the line, so that it can be read. Raises `OSError`, or `ValueError` if it is larger than the bound."""
        if len(line) > self._bound:
            raise ValueError(f"a request of {len(line)} bytes is larger than the bound of {self._bound}")
        hour = self._folder / at.strftime("%Y/%m/%d/%H")
        size = self._file.tell() if self._file and self._path.exists() else self._bound  # somebody may have removed it
        if self._file is None or self._path.parent != hour or size + len(line) > self._file_bytes:
            self.close()
            self._make_room(max(len(line), self._file_bytes))
            private_folder(hour)
            self._path = hour / f"{at:%M-%S-%f}-{uuid.uuid4()}.jsonl"
            self._file = open_private(self._path, "ab")
        try:
            self._file.write(line)
            self._file.flush()
        except OSError:
            self.close()  # what it still holds cannot be written either; the next line opens another
            raise

    def close(self) -> None:
        """Close the file that is being written."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _make_room(self, needed: int) -> None:
        sizes = {path: path.stat().st_size for path in sorted(self._folder.rglob("*.jsonl"))}  # paths sort by time
        left = sum(sizes.values())
        for oldest, size in sizes.items():
            if left + needed <= self._bound:
                return
            oldest.unlink(missing_ok=True)
            left -= size
            with contextlib.suppress(OSError):  # not empty
                for folder in list(oldest.parents)[:4]:
                    folder.rmdir()
