"""Offline store: Parquet in SageMaker's layout, or an Iceberg table, written some time after the record came."""

import io
import re
import secrets
import string
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from tests.sagemaker_emulator.errors import ApiError
from tests.sagemaker_emulator.services import Services

_ALPHANUMERIC = string.ascii_letters + string.digits
_TICK = 0.05
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")


@dataclass(frozen=True)
class OfflineRow:
    """One record on its way to the offline store."""

    uri: str
    region: str
    role: str | None
    types: tuple[tuple[str, str], ...]
    values: dict[str, str]
    event_time: datetime
    invoked: datetime
    blocked: Callable[[str], None]
    append: Callable[[Any], None] | None = None  # to the Iceberg table
    deleted: bool = False


class OfflineStore:
    """Collects rows and writes them as files after the configured delay."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, OfflineRow]] = []
        self._running = False

    def add(self, row: OfflineRow) -> None:
        """Queue a row."""
        with self._lock:
            self._waiting.append((time.monotonic() + self._services.settings.offline_store_delay, row))
            if not self._running:
                self._running = True
                self._services.spawn("offline-store", self._run)

    def _run(self) -> None:
        while not self._services.closing.wait(_TICK):
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                if self._waiting[0][0] > time.monotonic():
                    continue
                # Everything that waits goes out together, as one ingestion does: few files instead of one per row.
                rows, self._waiting = [row for _, row in self._waiting], []
            self._write(rows)

    def _write(self, rows: list[OfflineRow]) -> None:
        files: dict[tuple[str, str | None, str, str, tuple[tuple[str, str], ...]], list[OfflineRow]] = {}
        for row in rows:
            partition = "" if row.append else row.event_time.strftime("year=%Y/month=%m/day=%d/hour=%H")
            files.setdefault((row.region, row.role, row.uri, partition, row.types), []).append(row)
        for (region, role, uri, partition, types), members in files.items():
            latest = max(row.event_time for row in members).strftime("%Y%m%dT%H%M%SZ")
            suffix = "".join(secrets.choice(_ALPHANUMERIC) for _ in range(16))
            table = _arrow(types, members)
            try:
                if (append := members[0].append) is not None:
                    append(table)
                else:
                    path = f"{uri}/{partition}/{latest}_{suffix}.parquet"
                    self._services.storage(region, role).put(path, _parquet(table))
            except (ClientError, BotoCoreError, OSError) as error:
                members[0].blocked(str(error))


def parse_event_time(text: str, feature_type: str) -> datetime:
    """Event time of a record: ISO-8601 in UTC for String features, seconds since the epoch for Fractional ones."""
    try:
        if feature_type == "Fractional":
            return datetime.fromtimestamp(float(text), tz=UTC)
        if _TIME.fullmatch(text):
            return datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        pass
    text_form = "yyyy-MM-dd'T'HH:mm:ssZ or yyyy-MM-dd'T'HH:mm:ss.SSSZ"
    expected = "a Unix timestamp in seconds" if feature_type == "Fractional" else text_form
    raise ApiError(
        "ValidationError", f"Validation Error: The EventTime value {text!r} is not in the expected format, {expected}."
    )


def _arrow(types: tuple[tuple[str, str], ...], rows: list[OfflineRow]) -> Any:
    # Only the offline store needs pyarrow; the rest of the emulator starts without it.
    import pyarrow as pa

    kinds: dict[str, tuple[Any, Any]] = {
        "Integral": (pa.int64(), int), "Fractional": (pa.float64(), float), "String": (pa.string(), str),
    }  # fmt: skip
    columns: dict[str, Any] = {}
    for name, kind in types:
        arrow, convert = kinds[kind]
        given = (row.values.get(name) for row in rows)
        columns[name] = pa.array([None if value is None else convert(value) for value in given], type=arrow)
    stamp = pa.timestamp("ms", tz="UTC")
    written = datetime.now(UTC)
    columns["write_time"] = pa.array([written] * len(rows), type=stamp)
    columns["api_invocation_time"] = pa.array([row.invoked for row in rows], type=stamp)
    columns["is_deleted"] = pa.array([row.deleted for row in rows], type=pa.bool_())
    return pa.table(columns)


def _parquet(table: Any) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
