"""Captured requests, as the local server and SageMaker write them: read back as rows, and bounded by job `prune`.

JSON lines in files `<variant>/YYYY/MM/DD/HH/*.jsonl` (UTC) below the endpoint's folder.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.inventory import NotOwned, remove_empty
from step_scripts.runner import storage
from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import CSV, JSON
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    import numpy as np

    from step_scripts.serving.feature_parser import FeatureParser

# What SageMaker and the local server write below an endpoint's folder; anything else there is not ours.
_FILE = r"[^/]+/\d{4}/\d\d/\d\d/\d\d/[^/]+\.jsonl"


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


def read_captured(uri: str, table: TableSpec, since: datetime, limit: int, without: str = "") -> CapturedRows:
    """Rows of requests captured below `uri`, a local folder or an s3:// prefix, that were answered at `since` or later.

    At most `limit` rows, of the latest requests. Requests whose inference id starts with `without` are left out.
    """
    import numpy as np

    from step_scripts.serving.feature_parser import FeatureParser
    from step_scripts.serving.request_rows import RequestError

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
        except (RequestError, ValueError, KeyError, TypeError, AttributeError):
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
    import numpy as np

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
    from step_scripts.serving.served_model import request_media

    text = part["data"]
    body = base64.b64decode(text) if part["encoding"] == "BASE64" else text.encode()
    return request_media(part["observedContentType"]), body


@dataclass(frozen=True)
class CapturedFile:
    """One file of captured requests. `path`: below the endpoint's folder `folder`."""

    folder: str
    path: str
    bytes: int
    changed_at: datetime


def captured_below(root: str, subfolder: str = "") -> list[CapturedFile]:
    """The files of all endpoints below `root`, also of endpoints that are gone, in their folders or a subfolder."""
    pattern = re.compile(rf"([^/.][^/]*{subfolder})/({_FILE})")
    return [
        CapturedFile(storage.join(root, match[1]), match[2], size, datetime.fromtimestamp(modified, UTC))
        for path, size, modified in storage.list_details(root)
        if (match := pattern.fullmatch(path))
    ]


def surplus(files: Sequence[CapturedFile], before: datetime, most_bytes: float) -> list[CapturedFile]:
    """Those last changed `before`, and the oldest of each endpoint whose files have more than `most_bytes` together."""
    chosen = []
    for _, of_endpoint in groupby(sorted(files, key=lambda f: (f.folder, f.changed_at)), key=lambda f: f.folder):
        listed = list(of_endpoint)
        left = sum(file.bytes for file in listed)
        for file in listed:
            if file.changed_at >= before and left <= most_bytes:
                break
            chosen.append(file)
            left -= file.bytes
    return chosen


def remove_captured(files: Sequence[CapturedFile], root: str) -> None:
    """Remove the files, which must lie below `root`. Missing files are ignored. Raises `NotOwned`."""
    for folder in sorted({file.folder for file in files}):
        if not folder.startswith(root.rstrip("/") + "/"):
            raise NotOwned(f"{folder} is not below {root}; it is left alone")
        paths = [file.path for file in files if file.folder == folder]
        storage.delete_files(folder, paths)
        for path in paths:
            remove_empty(*(storage.join(folder, str(parent)) for parent in list(Path(path).parents)[:4]))
