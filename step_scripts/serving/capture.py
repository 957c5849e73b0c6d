"""Captured requests of the local endpoint: a sample of requests and answers, in SageMaker's form, bounded in size.

A thread writes them, so that answering never waits for a disk. What it cannot keep up with is dropped and counted.
Files are `<folder>/AllTraffic/YYYY/MM/DD/HH/MM-SS-mmm-<uuid>.jsonl` (UTC), as SageMaker writes them below its prefix;
when they are larger than the bound together, the oldest are removed. `step_scripts.serving.captured_requests` reads
both.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import uuid
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

from step_scripts.runner.local_files import open_private, private_folder
from step_scripts.serving.deployment import CaptureCounts, CaptureSettings
from step_scripts.serving.media import CSV

VARIANT = "AllTraffic"
_WAITING_BYTES = 32 << 20
_WAITING_REQUESTS = 20_000
_FILES = 8  # that the bound is made of, at least
_FILE_BYTES = 16 << 20
_BATCH_SECONDS = 0.2  # how long requests are gathered before they are written
_CLOSE_SECONDS = 5.0

logger = logging.getLogger("housing.serving")


class CapturedRequest(NamedTuple):
    """One request and its answer. `at`: when it was answered."""

    at: datetime
    input_type: str
    input_body: bytes
    output_type: str
    output_body: bytes
    inference_id: str

    @property
    def size(self) -> int:
        """Bytes of both bodies."""
        return len(self.input_body) + len(self.output_body)


class RequestCapture:
    """Writes a sample of requests below `folder`, in a thread of its own, until it is closed."""

    def __init__(self, folder: Path, settings: CaptureSettings) -> None:
        self.settings = settings
        self._files = _BoundedFiles(folder / VARIANT, int(settings.megabytes * 1e6))
        self._waiting: deque[CapturedRequest] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._closing = threading.Event()
        self._written = self._dropped = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def add(self, request: CapturedRequest) -> None:
        """Take the request if it falls into the sample. Never waits for the disk, never fails."""
        if random.random() * 100 >= self.settings.sampling_percentage:
            return
        with self._lock:  # the thread holds it for microseconds
            full = self._waiting_bytes + request.size > _WAITING_BYTES or len(self._waiting) >= _WAITING_REQUESTS
            if full or self._closing.is_set():
                self._dropped += 1
                return
            self._waiting.append(request)
            self._waiting_bytes += request.size
            if len(self._waiting) == 1:
                self._some.set()

    def counts(self) -> CaptureCounts:
        """What has become of the requests of the sample since the capture began."""
        return CaptureCounts(written=self._written, dropped=self._dropped, error=self._error)

    def close(self) -> None:
        """Write what waits, for some seconds at most, and end the thread."""
        self._closing.set()
        self._some.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._some.wait()
            self._closing.wait(_BATCH_SECONDS)
            self._write_waiting()
        self._write_waiting()
        self._files.close()

    def _write_waiting(self) -> None:
        self._some.clear()
        written = 0
        while True:
            with self._lock:
                if not self._waiting:
                    break
                request = self._waiting.popleft()
                self._waiting_bytes -= request.size
            try:
                self._files.write(request.at, captured_line(request))
                written += 1
                self._error = ""
            except (OSError, ValueError) as error:  # ValueError: larger than the bound
                self._failed(error)
                with self._lock:
                    self._dropped += 1
        try:
            self._files.flush()
        except OSError as error:
            self._failed(error)
        self._written += written  # only now can it be read

    def _failed(self, error: Exception) -> None:
        if not self._error:
            logger.error("requests cannot be captured: %s", error)
        self._error = str(error)
        if isinstance(error, OSError):
            self._files.close()  # what it still holds cannot be written either; the next request opens another


def captured_line(request: CapturedRequest) -> bytes:
    """One line of SageMaker's captured data."""
    # SageMaker's times are whole seconds; finer ones tell the requests before a change of model from those after it.
    metadata = {"eventId": str(uuid.uuid4()), "inferenceTime": request.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    if request.inference_id:
        metadata["inferenceId"] = request.inference_id
    data = {
        "endpointInput": _captured("INPUT", request.input_type, request.input_body),
        "endpointOutput": _captured("OUTPUT", request.output_type, request.output_body),
    }
    return json.dumps({"captureData": data, "eventMetadata": metadata, "eventVersion": "0"}).encode() + b"\n"


def _captured(mode: str, media: str, body: bytes) -> dict[str, str]:
    encoding = "CSV" if media == CSV else "JSON"
    text = body.decode(errors="replace")
    return {"observedContentType": media, "mode": mode, "data": text, "encoding": encoding}


class _BoundedFiles:
    """Files of an hour each at most, the oldest of which make room for new ones. For one thread."""

    def __init__(self, folder: Path, bound: int) -> None:
        self._folder = folder
        if folder.parent.is_dir():
            folder.parent.chmod(0o700)  # an earlier version made it for all to read
        self._bound = bound
        self._file_bytes = min(bound // _FILES, _FILE_BYTES)
        # Paths sort by time. A file counts with the size it had when the capture began, or that was written since.
        self._sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*.jsonl"))}
        self._total = sum(self._sizes.values())
        self._file: IO[bytes] | None = None
        self._current = folder

    def write(self, at: datetime, line: bytes) -> None:
        """Append the line. Raises `OSError`, or `ValueError` if it alone is larger than the bound."""
        if len(line) > self._bound:
            raise ValueError(f"a request of {len(line)} bytes is larger than the bound of {self._bound}")
        hour = self._folder / at.strftime("%Y/%m/%d/%H")
        size = self._sizes.get(self._current, 0)
        if self._file is None or self._current.parent != hour or (size and size + len(line) > self._file_bytes):
            self._open(hour, at)
        self._make_room(len(line))
        assert self._file is not None
        self._file.write(line)
        self._sizes[self._current] += len(line)
        self._total += len(line)

    def flush(self) -> None:
        """Hand what was written to the operating system. A file that somebody has removed is not written on."""
        if self._file is not None:
            self._file.flush()
            if not self._current.exists():
                self.close()

    def close(self) -> None:
        """Close the file that is being written."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self, hour: Path, at: datetime) -> None:
        self.close()
        private_folder(hour)
        path = hour / f"{at:%M-%S}-{at.microsecond // 1000:03d}-{uuid.uuid4()}.jsonl"
        self._file = open_private(path, "ab")
        self._current = path
        self._sizes[path] = 0

    def _make_room(self, needed: int) -> None:
        while self._total + needed > self._bound:
            oldest = next(path for path in self._sizes if path != self._current)
            oldest.unlink(missing_ok=True)
            self._total -= self._sizes.pop(oldest)
            with contextlib.suppress(OSError):  # not empty
                for folder in list(oldest.parents)[:4]:
                    folder.rmdir()


def now() -> datetime:
    """The time that a request is recorded with."""
    return datetime.now(UTC)
