"""Captured requests, in SageMaker's form: what the local endpoint writes, and how both are read back as rows.

JSON lines in files `<prefix>/<variant>/YYYY/MM/DD/HH/*.jsonl` (UTC). The local endpoint keeps a sample, bounded in
size: a thread writes it, so that answering never waits for a disk. What it cannot keep up with is dropped and counted;
when the files are larger than the bound together, the oldest are removed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import random
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from step_scripts.runner import storage
from step_scripts.runner.local_files import open_private, private_folder
from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import CaptureCounts, CaptureSettings
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.serving.media import CSV, JSON, RequestError, request_media
from step_scripts.table.spec import TableSpec

_VARIANT = "AllTraffic"
_WAITING_BYTES = 32 << 20
_WAITING_REQUESTS = 20_000
_FILES = 8  # that the bound is made of, at least
_FILE_BYTES = 16 << 20
_BATCH_SECONDS = 0.2  # how long requests are gathered before they are written
_CLOSE_SECONDS = 5.0
_ERRORS = (RequestError, ValueError, KeyError, TypeError, AttributeError)  # of a line that is not what it should be

logger = logging.getLogger("housing.serving")


class CapturedRequest(NamedTuple):
    """One request and its answer. `at`: when it was answered."""

    at: datetime
    input_type: str
    input_body: bytes
    output_type: str
    output_body: bytes
    inference_id: str


class RequestCapture:
    """Writes a sample of requests below `folder`, in a thread of its own, until it is closed."""

    def __init__(self, folder: Path, settings: CaptureSettings) -> None:
        self.settings = settings
        self._files = _BoundedFiles(folder / _VARIANT, int(settings.megabytes * 1e6))
        self._waiting: deque[tuple[int, CapturedRequest]] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._written = self._dropped = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def add(self, request: CapturedRequest) -> None:
        """Take the request if it falls into the sample. Never waits for the disk, never fails."""
        if random.random() * 100 >= self.settings.sampling_percentage:
            return
        size = len(request.input_body) + len(request.output_body)
        with self._lock:  # the thread holds it for microseconds
            full = self._waiting_bytes + size > _WAITING_BYTES or len(self._waiting) >= _WAITING_REQUESTS
            if full or self._closing.is_set():
                self._dropped += 1
            else:
                self._waiting.append((size, request))
                self._waiting_bytes += size

    def counts(self) -> CaptureCounts:
        """What has become of the requests of the sample since the capture began."""
        return CaptureCounts(written=self._written, dropped=self._dropped, error=self._error)

    def close(self) -> None:
        """Write what waits, for some seconds at most, and end the thread."""
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(_BATCH_SECONDS):
            self._write_waiting()
        self._write_waiting()
        self._files.close()

    def _write_waiting(self) -> None:
        written = 0
        while True:
            with self._lock:
                if not self._waiting:
                    break
                size, request = self._waiting.popleft()
                self._waiting_bytes -= size
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


@dataclass(frozen=True)
class CapturedRows:
    """Rows of captured requests, those of the latest requests first.

    `features`: float64, shape (rows, features), nulls as NaN, columns in the order of the table's features.
    `predictions`: float64, shape (rows,). `requests`: how many requests the rows are from. `unreadable`: lines that
    are not a request of this table with its answer. `oldest`: when the oldest of the requests was answered.
    """

    features: np.ndarray
    predictions: np.ndarray
    requests: int
    unreadable: int
    oldest: datetime | None

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.predictions)


def read_captured(uri: str, table: TableSpec, since: datetime, limit: int, without: str = "") -> CapturedRows:
    """Rows of requests captured below `uri`, a local folder or an s3:// prefix, that were answered at `since` or later.

    At most `limit` rows, of the latest requests. Requests whose inference id starts with `without` are left out.
    """
    parser = FeatureParser(table)
    features, predictions = [np.empty((0, len(table.features)))], [np.empty(0)]
    unreadable = found = 0
    oldest: datetime | None = None
    for line in _lines(uri, since):
        if found >= limit:
            break
        try:
            captured = json.loads(line)
            metadata = captured["eventMetadata"]
            at = datetime.fromisoformat(metadata["inferenceTime"])
            if at < since or (without and metadata.get("inferenceId", "").startswith(without)):
                continue
            rows, served = _rows(captured["captureData"], parser)
        except _ERRORS:
            unreadable += 1
            continue
        features.append(rows[: limit - found])
        predictions.append(served[: limit - found])
        found += len(predictions[-1])
        oldest = at if oldest is None else min(oldest, at)
    return CapturedRows(
        features=np.concatenate(features),
        predictions=np.concatenate(predictions),
        requests=len(predictions) - 1,
        unreadable=unreadable,
        oldest=oldest,
    )


def _lines(uri: str, since: datetime) -> Iterator[bytes]:
    """Lines of all files of the days from `since` on, the latest first."""
    if not storage.exists(uri):
        return
    day, last = datetime.now(UTC).date(), since.astimezone(UTC).date()
    variants = [storage.join(uri, name) for name in storage.list_folders(uri)]
    while day >= last:
        folders = [storage.join(variant, f"{day:%Y/%m/%d}") for variant in variants]
        files = [file for folder in folders for file in storage.list_files(folder) if file.endswith(".jsonl")]
        for file in sorted(files, key=lambda file: file.rsplit("/", 2)[1:], reverse=True):
            try:
                content = storage.read_bytes(file)
            except FileNotFoundError:  # made room for newer ones
                continue
            yield from reversed(content.splitlines())
        day -= timedelta(days=1)


def _rows(data: dict[str, Any], parser: FeatureParser) -> tuple[np.ndarray, np.ndarray]:
    """Features and predictions of one request. Raises `RequestError`, or what Python does, where they are neither."""
    media, body = _body(data["endpointInput"])
    features = parser.parse(body, media)
    media, body = _body(data["endpointOutput"])
    if media == CSV:
        values = [float(value) for value in body.split()]
    elif media == JSON:
        values = json.loads(body)["predictions"]
    else:
        values = [json.loads(line)["prediction"] for line in body.splitlines()]
    predictions = np.array(values, dtype=np.float64)
    if predictions.shape != (len(features),):
        raise ValueError(f"{counted(len(features), 'row')}, predictions of shape {predictions.shape}")
    return features, predictions


def _body(part: dict[str, Any]) -> tuple[str, bytes]:
    text = part["data"]
    body = base64.b64decode(text) if part["encoding"] == "BASE64" else text.encode()
    return request_media(part["observedContentType"]), body
