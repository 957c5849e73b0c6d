"""Calls of SageMaker's feature store runtime for many records, repeated until each has been accepted or refused."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted

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
class Patience:
    """How long, in seconds, a store may accept nothing, who is told of every wait, and what ends it early."""

    seconds: float
    tell: Callable[[str, float], None] = lambda reason, waited: None
    stop: threading.Event = field(default_factory=threading.Event)


class _Attempts:
    """Waits between attempts, longer each time, until nothing has been accepted for too long."""

    def __init__(self, patience: Patience, group: str) -> None:
        self._patience, self._group = patience, group
        self.progress()

    def progress(self) -> None:
        self._began = time.monotonic()
        self._pause = 0.1

    def wait(self, reason: str) -> None:
        """Raises `StepError` if there is no more patience, or another thread has given up."""
        waited = time.monotonic() - self._began
        left = self._patience.seconds - waited
        if left <= 0:
            raise StepError(
                f"the online store of feature group {self._group} has accepted no request for "
                f"{self._patience.seconds:.0f} s ({reason})"
            )
        self._patience.tell(reason, waited)
        if self._patience.stop.wait(min(left, random.uniform(self._pause / 2, self._pause))):
            raise StepError(f"the online store of feature group {self._group} is given up ({reason})")
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def write_records(store: Any, group: str, records: Sequence[Mapping[str, str]], patience: Patience) -> None:
    """Write records, given by their features, to the online store only.

    Raises `StepError` naming a record that the store refuses, or if it accepts nothing for too long.
    """
    for start in range(0, len(records), _WRITTEN_AT_ONCE):
        entries: list[dict[str, Any]] = [
            {"FeatureGroupName": group, "TargetStores": ["OnlineStore"], "Record": _features(record)}
            for record in records[start : start + _WRITTEN_AT_ONCE]
        ]
        try:
            _write_entries(store, group, entries, patience)
        except _Refused:  # because of one entry, perhaps: find out which
            for entry in entries:
                try:
                    _write_entries(store, group, [entry], patience)
                except _Refused as error:
                    raise StepError(f"record {_id_of(entry)}: {error}") from error


def _write_entries(store: Any, group: str, entries: list[dict[str, Any]], patience: Patience) -> None:
    def write(pending: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        answer, reason = _answer(store.batch_write_record, Entries=pending)
        if answer is None:
            return pending, reason
        left = list(answer.get("UnprocessedEntries", []))
        for error in answer.get("Errors", []):
            if error["ErrorCode"] not in _TRANSIENT:
                raise StepError(
                    f"record {_id_of(error['Entry'])}: the online store of feature group {group} refuses it: "
                    f"{error['ErrorCode']}: {error['ErrorMessage'][:_SHOWN]}"
                )
            left.append(error["Entry"])
        return left, f"{counted(len(left), 'entry', 'entries')} not processed"

    _repeat_until_done(write, entries, group, patience)


def _repeat_until_done(
    call: Callable[[list[Any]], tuple[list[Any], str]], pending: list[Any], group: str, patience: Patience
) -> None:
    """Call with what is `pending` until nothing is left. `call` returns what is left, and why.

    Raises `StepError` if nothing becomes less for too long.
    """
    attempts = _Attempts(patience, group)
    while pending:
        left, reason = call(pending)
        if len(left) < len(pending):
            attempts.progress()
        if left:
            attempts.wait(reason)
        pending = left


def delete_records(
    store: Any, group: str, deletions: Sequence[tuple[str, str]], patience: Patience, *, hard: bool = False
) -> None:
    """Delete records, given by id and event time of the deletion, from the online store only.

    With `hard` nothing is kept of them, so that an earlier event may be written again.
    """
    mode = {"DeletionMode": "HardDelete"} if hard else {}
    for record_id, event_time in deletions:
        attempts = _Attempts(patience, group)
        while True:
            answer, reason = _answer(
                store.delete_record,
                FeatureGroupName=group,
                RecordIdentifierValueAsString=record_id,
                EventTime=event_time,
                TargetStores=["OnlineStore"],
                **mode,
            )
            if answer is not None:
                break
            attempts.wait(reason)


def read_records(store: Any, group: str, ids: Sequence[str], patience: Patience) -> dict[str, dict[str, str]]:
    """Features of those records that the online store holds, by record id."""
    found: dict[str, dict[str, str]] = {}

    def read(pending: list[str]) -> tuple[list[str], str]:
        identifiers = [{"FeatureGroupName": group, "RecordIdentifiersValueAsString": pending}]
        answer, reason = _answer(store.batch_get_record, Identifiers=identifiers)
        if answer is None:
            return pending, reason
        for record in answer.get("Records", []):
            found[record["RecordIdentifierValueAsString"]] = features_of(record["Record"])
        left = [i for u in answer.get("UnprocessedIdentifiers", []) for i in u["RecordIdentifiersValueAsString"]]
        for error in answer.get("Errors", []):
            if error["ErrorCode"] not in _TRANSIENT:
                raise StepError(
                    f"record {error['RecordIdentifierValueAsString']} cannot be read from the online store of "
                    f"feature group {group}: {error['ErrorCode']}: {error['ErrorMessage']}"
                )
            left.append(error["RecordIdentifierValueAsString"])
        return left, f"not read: {counted(len(left), 'record')}"

    for start in range(0, len(ids), _READ_AT_ONCE):
        _repeat_until_done(read, list(ids[start : start + _READ_AT_ONCE]), group, patience)
    return found


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
