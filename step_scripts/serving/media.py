"""Requests and responses of the inference server: media types, encodings, errors and bad rows."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import MAX_BODY_BYTES

CSV = "text/csv"
JSON = "application/json"
JSON_LINES = "application/jsonlines"
MAX_REPORTED_PROBLEMS = 100
_MEDIA = {CSV: CSV, JSON: JSON, JSON_LINES: JSON_LINES, "application/x-jsonlines": JSON_LINES}
_MEDIA |= {"application/jsonl": JSON_LINES, "application/x-ndjson": JSON_LINES, "application/ndjson": JSON_LINES}
_WILDCARDS = {"*/*": "", "text/*": CSV, "application/*": ""}
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_MAX_SHOWN = 100  # characters of a wrong value
_ENCODED = 4096  # predictions
_GZIP = 16 + zlib.MAX_WBITS


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, reason, and for bad rows a table of what is wrong.

    `rows` holds at most `MAX_REPORTED_PROBLEMS` entries `{"row", "column", "value", "reason"}`, `problems` how many
    there are or, in a large body, were found until it was read no further. Rows count from 1, without a header line.
    """

    def __init__(self, status: int, reason: str, rows: Sequence[dict[str, Any]] = (), problems: int = 0) -> None:
        super().__init__(reason)
        self.status = status
        self.rows = rows
        self.problems = problems

    def body(self) -> dict[str, Any]:
        """The response's JSON. AWS clients read `message`."""
        value: dict[str, Any] = {"error": str(self), "message": str(self)}
        if self.problems:
            value |= {"problems": self.problems, "rows": self.rows}
        return value


class FoundRows:
    """Rows of a request so far, in pieces, or what is wrong with them."""

    def __init__(self, features: Sequence[str]) -> None:
        self._values: list[np.ndarray] = [np.empty((0, len(features)))]
        self._rows = self._bad_rows = self._total = 0
        self._problems: list[dict[str, Any]] = []

    @property
    def enough(self) -> bool:
        """Whether there are as many problems as are reported: what is wrong beside them changes nothing."""
        return self._total >= MAX_REPORTED_PROBLEMS

    def add(self, values: np.ndarray) -> None:
        """Add rows that are in order."""
        self._rows += len(values)
        if not self._problems:
            self._values.append(values)

    def add_problems(self, problems: Sequence[dict[str, Any]], total: int, bad_rows: int, rows: int) -> None:
        """Add `rows` rows of which `bad_rows` are wrong; `problems`, some of `total`, count rows from 0."""
        self._values.clear()
        self._problems += [{**problem, "row": self._rows + 1 + problem["row"]} for problem in problems]
        self._rows, self._total, self._bad_rows = self._rows + rows, self._total + total, self._bad_rows + bad_rows

    def result(self, more: int = 0) -> np.ndarray:
        """The features. Raises `RequestError` 400 where there are problems; `more`: rows not looked at, about."""
        if not self._rows:
            raise RequestError(400, "the request has no rows")
        if not self._problems:
            return np.concatenate(self._values)
        reported = self._problems[:MAX_REPORTED_PROBLEMS]
        where = f"row {reported[0]['row']}" + (f", {reported[0]['column']}" if reported[0]["column"] else "")
        bad = f"at least {self._bad_rows} of about" if more else f"{self._bad_rows} of"
        rows = counted(self._rows + more, "row")
        summary = f"{bad} {rows} cannot be used; first: {where}: {reported[0]['reason']}"
        raise RequestError(400, summary, reported, self._total)


def row_problem(row: Any, column: str | None, value: Any, reason: str) -> dict[str, Any]:
    """One entry of what is wrong; rows count from 0 until they are added."""
    return {"row": int(row), "column": column, "value": value, "reason": reason}


@lru_cache(maxsize=256)
def request_media(content_type: str) -> str:
    """`CSV`, `JSON` or `JSON_LINES`. Raises `RequestError` 415 for another type or an encoding other than UTF-8."""
    name, parameters = _media_type(content_type)
    if (charset := parameters.get("charset", "utf-8").strip('"')) not in _CHARSETS:
        raise RequestError(415, f"charset {charset} is not supported; send UTF-8")
    if name not in _MEDIA:
        given = f"content type {name!r} is not supported" if name else "the request has no Content-Type"
        raise RequestError(415, f"{given}; send {CSV}, {JSON} or {JSON_LINES}")
    return _MEDIA[name]


@lru_cache(maxsize=256)
def response_media(accept: str, default: str) -> str:
    """The type among those of an Accept header with the highest weight; `default` where it leaves the choice.

    Raises `RequestError` 406 if it names none that can be sent.
    """
    best, best_weight = "", 0.0
    for entry in accept.split(","):
        name, parameters = _media_type(entry)
        try:
            weight = float(parameters.get("q", 1.0))
        except ValueError:
            weight = 0.0
        media = _WILDCARDS[name] or default if name in _WILDCARDS else _MEDIA.get(name, "")
        if media and weight > best_weight:
            best, best_weight = media, weight
    if not accept.strip():
        return default
    if not best:
        raise RequestError(406, f"{accept!r} cannot be sent; accepted are {CSV}, {JSON} and {JSON_LINES}")
    return best


def _media_type(text: str) -> tuple[str, dict[str, str]]:
    """The name and the parameters of a media type, in lower case."""
    name, *parameters = (part.strip() for part in text.lower().split(";"))
    pairs = (parameter.partition("=") for parameter in parameters)
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def encode(predictions: np.ndarray, media: str) -> bytes:
    """Predictions as a body: one a line (CSV), `{"predictions": [...]}` (JSON), `{"prediction": x}` lines."""
    between = "\n" if media == CSV else ", " if media == JSON else '}\n{"prediction": '
    # In parts, between which other threads have their turn: one call for all would hold them up.
    parts = (predictions[at : at + _ENCODED].tolist() for at in range(0, len(predictions), _ENCODED))
    values = between.join(between.join(map(repr, part)) for part in parts)
    if media == CSV:
        return f"{values}\n".encode()
    if media == JSON:
        return f'{{"predictions": [{values}]}}'.encode()
    return f'{{"prediction": {values}}}\n'.encode()


def unpacked(body: bytes, encoding: str) -> bytes:
    """The body without its Content-Encoding.

    Raises `RequestError` 415 for another one than gzip, 400 if it is not what it says, 413 if it is too large then.
    """
    if encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() not in ("gzip", "x-gzip"):
        raise RequestError(415, f"content encoding {encoding[:100]!r} is not supported; send gzip, or none")
    stream = zlib.decompressobj(wbits=_GZIP)
    try:
        content = stream.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not gzip: {error}") from error
    if len(content) > MAX_BODY_BYTES:
        raise too_large()
    if not stream.eof or stream.unused_data:
        problem = "something follows its end" if stream.eof else "its end is missing"
        raise RequestError(400, f"the body is not one gzip stream: {problem}")
    return content


def too_large() -> RequestError:
    """The refusal of a body that is larger than the limit."""
    return RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send the rows in several requests")


def decode_text(body: bytes) -> str:
    """The body as text. Raises `RequestError` 400 if it is not UTF-8 or blank."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise RequestError(400, "the body is empty")
    return text


def shown(value: Any) -> Any:
    """`value` as it is reported: short, and valid JSON."""
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and abs(value) < 10**18:
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
