"""The online store of a SageMaker feature group: records as text, and calls for many of them.

SageMaker has three types. Integers and truth values are `Integral`, floating-point numbers `Fractional`, texts and
times `String` (ISO 8601, microseconds). So is the event time, by whose date SageMaker partitions Iceberg tables; the
online store takes no more of it than milliseconds. What is null, or not a number, is left out.

Calls are repeated until each record has been accepted or refused.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted
from step_scripts.table.spec import DType, TableSpec

# Of each type: SageMaker's, and values to text and back.
_VALUES: dict[DType, tuple[str, Callable[[Any], str], Callable[[str], Any]]] = {
    "int64": ("Integral", str, int),
    "float64": ("Fractional", repr, float),
    "bool": ("Integral", lambda value: str(int(value)), lambda text: bool(int(text))),
    "string": ("String", str, str),
    "datetime": (
        "String",
        lambda value: value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        datetime.fromisoformat,
    ),
}
RECORD_ID, EVENT_TIME = "record_id", "event_time"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WRITTEN_AT_ONCE = 25  # the service's limits
_READ_AT_ONCE = 100
_LONGEST_PAUSE = 10.0  # seconds
_SHOWN = 400  # characters of a reason, which may quote a whole record
_TRANSIENT = {
    "InternalFailure",
    "InternalServerError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}


class _Refused(StepError):
    """The service refuses a request as it is."""


@dataclass(frozen=True)
class OnlineClient:
    """The online store of one group. `client`: boto3's, of the runtime.

    Calls are repeated until nothing has been accepted for `retry_timeout_seconds`, or `stop` is set by another thread:
    then they raise `StepError`. So they do, naming it, for a record that the store refuses.
    """

    client: Any
    group: str
    retry_timeout_seconds: float
    stop: threading.Event = field(default_factory=threading.Event)

    def write(self, records: Sequence[Mapping[str, str]]) -> None:
        """Write records, given by their features, to the online store only."""
        for start in range(0, len(records), _WRITTEN_AT_ONCE):
            entries: list[dict[str, Any]] = [
                {"FeatureGroupName": self.group, "TargetStores": ["OnlineStore"], "Record": _features(record)}
                for record in records[start : start + _WRITTEN_AT_ONCE]
            ]
            try:
                self._repeat(self._write_entries, entries)
            except _Refused:  # because of one entry, perhaps: find out which
                for entry in entries:
                    try:
                        self._repeat(self._write_entries, [entry])
                    except _Refused as error:
                        raise StepError(f"record {_id_of(entry)}: {error}") from error

    def delete(self, deletions: Sequence[tuple[str, str]], *, hard: bool = False) -> None:
        """Delete records, given by id and event time of the deletion, from the online store only.

        With `hard` nothing is kept of them, so that an earlier event may be written again.
        """
        mode = {"DeletionMode": "HardDelete"} if hard else {}

        def delete_first(pending: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], str]:
            record_id, event_time = pending[0]
            answer, reason = _answer(
                self.client.delete_record,
                FeatureGroupName=self.group,
                RecordIdentifierValueAsString=record_id,
                EventTime=event_time,
                TargetStores=["OnlineStore"],
                **mode,
            )
            return pending[1:] if answer is not None else pending, reason

        self._repeat(delete_first, list(deletions))

    def read(self, ids: Sequence[str]) -> dict[str, dict[str, str]]:
        """Features of those records that the online store holds, by record id."""
        found: dict[str, dict[str, str]] = {}

        def read(pending: list[str]) -> tuple[list[str], str]:
            identifiers = [{"FeatureGroupName": self.group, "RecordIdentifiersValueAsString": pending}]
            answer, reason = _answer(self.client.batch_get_record, Identifiers=identifiers)
            if answer is None:
                return pending, reason
            for record in answer.get("Records", []):
                found[record["RecordIdentifierValueAsString"]] = features_of(record["Record"])
            left = [i for u in answer.get("UnprocessedIdentifiers", []) for i in u["RecordIdentifiersValueAsString"]]
            for error in answer.get("Errors", []):
                if error["ErrorCode"] not in _TRANSIENT:
                    raise StepError(
                        f"record {error['RecordIdentifierValueAsString']} cannot be read from the online store of "
                        f"feature group {self.group}: {error['ErrorCode']}: {error['ErrorMessage']}"
                    )
                left.append(error["RecordIdentifierValueAsString"])
            return left, f"not read: {counted(len(left), 'record')}"

        for start in range(0, len(ids), _READ_AT_ONCE):
            self._repeat(read, list(ids[start : start + _READ_AT_ONCE]))
        return found

    def _write_entries(self, pending: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        answer, reason = _answer(self.client.batch_write_record, Entries=pending)
        if answer is None:
            return pending, reason
        left = list(answer.get("UnprocessedEntries", []))
        for error in answer.get("Errors", []):
            if error["ErrorCode"] not in _TRANSIENT:
                raise StepError(
                    f"record {_id_of(error['Entry'])}: the online store of feature group {self.group} refuses it: "
                    f"{error['ErrorCode']}: {error['ErrorMessage'][:_SHOWN]}"
                )
            left.append(error["Entry"])
        return left, f"{counted(len(left), 'entry', 'entries')} not processed"

    def _repeat(self, call: Callable[[list[Any]], tuple[list[Any], str]], pending: list[Any]) -> None:
        """Call with what is `pending` until nothing is left. `call` returns what is left, and why."""
        since, pause = time.monotonic(), 0.1
        while pending:
            left, reason = call(pending)
            if len(left) < len(pending):
                since, pause = time.monotonic(), 0.1
            elif (remaining := self.retry_timeout_seconds - (time.monotonic() - since)) <= 0:
                raise StepError(
                    f"the online store of feature group {self.group} has accepted no request for "
                    f"{self.retry_timeout_seconds:.0f} s ({reason})"
                )
            elif self.stop.wait(min(remaining, random.uniform(pause / 2, pause))):
                raise StepError(f"the online store of feature group {self.group} is given up ({reason})")
            else:
                pause = min(2 * pause, _LONGEST_PAUSE)
            pending = left


def features_of(record: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The features of a record, as the service returns it, by name. Empty ones are left out."""
    return {f["FeatureName"]: f["ValueAsString"] for f in record if f.get("ValueAsString") is not None}


def _features(record: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"FeatureName": name, "ValueAsString": text} for name, text in record.items()]


def _id_of(entry: Mapping[str, Any]) -> str:
    return features_of(entry["Record"]).get("record_id", "?")


def _answer(function: Any, **request: Any) -> tuple[dict[str, Any] | None, str]:
    """The call's answer; None and the reason if the same call may succeed later."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    try:
        return function(**request), ""
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _TRANSIENT or status == 429 or status >= 500:
            return None, str(error)
        message = f"the online store refuses {function.__name__}: {str(error)[:_SHOWN]}"
        raise (_Refused if "Validation" in code else StepError)(message) from error
    except (ConnectionError, HTTPClientError) as error:
        return None, str(error)


def feature_types(table: TableSpec) -> dict[str, str]:
    """SageMaker's type of each feature, in order: record id, event time, the table's columns."""
    types = {RECORD_ID: "String", EVENT_TIME: "String"}
    return types | {column.name: _VALUES[column.dtype][0] for column in table.columns}


def encoded_time(microseconds: int) -> str:
    """`yyyy-MM-ddTHH:mm:ss.SSSZ` of an event time in microseconds since 1970, without what is below a millisecond."""
    moment = _EPOCH + timedelta(microseconds=microseconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def decoded_time(text: str) -> int:
    """Microseconds since 1970."""
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)


def encoded_records(events: pl.DataFrame, table: TableSpec) -> list[dict[str, str]]:
    """Features of each row as text."""
    columns: dict[str, list[str | None]] = {
        RECORD_ID: events[RECORD_ID].to_list(),
        EVENT_TIME: [encoded_time(t) for t in events[EVENT_TIME].to_physical().to_list()],
    }
    for column in table.columns:
        _, encode, _ = _VALUES[column.dtype]
        values = events[column.name].to_list()
        columns[column.name] = [encode(v) if v is not None and v == v else None for v in values]
    names = list(columns)
    return [
        {name: text for name, text in zip(names, row, strict=True) if text is not None}
        for row in zip(*columns.values(), strict=True)
    ]


def decoded_record(features: Mapping[str, str], table: TableSpec) -> dict[str, Any]:
    """Values of a record's features: record_id, event_time (UTC), the table's columns."""
    record: dict[str, Any] = {RECORD_ID: features[RECORD_ID], EVENT_TIME: datetime.fromisoformat(features[EVENT_TIME])}
    for column in table.columns:
        text, (*_, decode) = features.get(column.name), _VALUES[column.dtype]
        record[column.name] = decode(text) if text is not None else None
    return record
