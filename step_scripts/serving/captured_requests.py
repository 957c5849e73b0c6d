"""Captured requests as rows: raw features with the predictions that were served.

SageMaker's data capture and `step_scripts.serving.capture` write the same form: JSON lines, in files
`<prefix>/<variant>/YYYY/MM/DD/HH/*.jsonl`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from step_scripts.runner import storage
from step_scripts.runner.wording import counted
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.serving.media import CSV, JSON, RequestError, request_media
from step_scripts.table.spec import TableSpec

_ERRORS = (RequestError, ValueError, KeyError, TypeError, AttributeError)  # of a line that is not what it should be


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
    features: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
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
    empty = np.empty((0, len(table.features)))
    return CapturedRows(
        features=np.concatenate([empty, *features]),
        predictions=np.concatenate([np.empty(0), *predictions]),
        requests=len(predictions),
        unreadable=unreadable,
        oldest=oldest,
    )


def _lines(uri: str, since: datetime) -> Iterator[bytes]:
    """Lines of all files of the days from `since` on, the latest first."""
    if not storage.exists(uri):
        return
    day, last = datetime.now(UTC).date(), since.astimezone(UTC).date()
    variants = storage.list_folders(uri)
    while day >= last:
        files = [
            file
            for variant in variants
            for file in storage.list_files(storage.join(variant, f"{day:%Y/%m/%d}"))
            if file.endswith(".jsonl")
        ]
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
