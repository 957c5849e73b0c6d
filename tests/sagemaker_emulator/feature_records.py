"""The feature-store runtime: records in the online store, rows for the offline store."""

import time
from datetime import UTC, datetime
from typing import Any

from tests.sagemaker_emulator.common import Call, Handler, Params
from tests.sagemaker_emulator.errors import ApiError
from tests.sagemaker_emulator.feature_groups import FeatureGroup, FeatureGroups, OnlineRecord, require_created
from tests.sagemaker_emulator.offline_store import OfflineRow, OfflineStore, parse_event_time
from tests.sagemaker_emulator.services import Services

_UNITS = {"Seconds": 1, "Minutes": 60, "Hours": 3600, "Days": 86400, "Weeks": 604800}
_RECORD_BYTES = 350 * 1024


class FeatureRecords:
    """PutRecord, GetRecord, DeleteRecord, BatchGetRecord, BatchWriteRecord."""

    def __init__(self, services: Services, groups: FeatureGroups) -> None:
        self._services = services
        self._groups = groups
        self._offline = OfflineStore(services)

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "PutRecord": self._put,
            "GetRecord": self._get,
            "DeleteRecord": self._delete,
            "BatchGetRecord": self._batch_get,
            "BatchWriteRecord": self._batch_write,
        }

    def _put(self, call: Call) -> Params:
        self._write(call.region, call.params)
        return {}

    def _write(self, region: str, entry: Params) -> None:
        group = self._groups.find(region, entry["FeatureGroupName"])
        require_created(group)
        values = _values(group, entry["Record"])
        event_time = parse_event_time(values[group.event_time], group.types[group.event_time])
        stores = _stores(group, entry.get("TargetStores"))
        if "OnlineStore" in stores:
            ttl = entry.get("TtlDuration") or group.request["OnlineStoreConfig"].get("TtlDuration")
            expires = event_time.timestamp() + ttl["Value"] * _UNITS[ttl["Unit"]] if ttl else None
            record = OnlineRecord(event_time.timestamp(), values, expires=expires)
            self._replace(group, values[group.identifier], record)
        if "OfflineStore" in stores:
            self._append(group, values, event_time)

    @staticmethod
    def _replace(group: FeatureGroup, identifier: str, record: OnlineRecord) -> None:
        with group.lock:
            present = group.records.get(identifier)
            # The online store keeps the latest event; one that is not later goes to the offline store only.
            if present is None or record.event_time > present.event_time:
                group.records[identifier] = record

    def _append(self, group: FeatureGroup, values: dict[str, str], event_time: datetime, deleted: bool = False) -> None:
        row = OfflineRow(
            uri=group.resolved_uri,
            region=group.region,
            role=group.request.get("RoleArn"),
            types=tuple(group.types.items()),
            values=values,
            event_time=event_time,
            invoked=datetime.now(UTC),
            blocked=group.block,
            append=self._groups.appender(group),
            deleted=deleted,
        )
        self._offline.add(row)

    def _delete(self, call: Call) -> Params:
        params = call.params
        group = self._groups.find(call.region, params["FeatureGroupName"])
        require_created(group)
        identifier, text = params["RecordIdentifierValueAsString"], params["EventTime"]
        event_time = parse_event_time(text, group.types[group.event_time])
        stores = _stores(group, params.get("TargetStores"))
        if "OnlineStore" in stores:
            if params.get("DeletionMode", "SoftDelete") == "HardDelete":
                with group.lock:
                    present = group.records.get(identifier)
                    if present and event_time.timestamp() <= present.event_time:
                        raise _invalid("The EventTime of the deletion is not later than that of the record.")
                    group.records.pop(identifier, None)
            else:
                self._replace(group, identifier, OnlineRecord(event_time.timestamp(), {}, deleted=True))
        if "OfflineStore" in stores:
            self._append(group, {group.identifier: identifier, group.event_time: text}, event_time, deleted=True)
        return {}

    def _get(self, call: Call) -> Params:
        group = self._online_group(call.region, call.params["FeatureGroupName"])
        record = _live(group, call.params["RecordIdentifierValueAsString"])
        return _shown(group, record, call.params.get("FeatureNames"), call.params.get("ExpirationTimeResponse"))

    def _batch_get(self, call: Call) -> Params:
        records: list[Params] = []
        for wanted in call.params["Identifiers"]:
            group = self._online_group(call.region, wanted["FeatureGroupName"])
            for identifier in wanted["RecordIdentifiersValueAsString"]:
                record = _live(group, identifier)
                if record is None:
                    continue
                shown = _shown(group, record, wanted.get("FeatureNames"), call.params.get("ExpirationTimeResponse"))
                key = {"FeatureGroupName": wanted["FeatureGroupName"], "RecordIdentifierValueAsString": identifier}
                records.append({**key, **shown})
        return {"Records": records, "Errors": [], "UnprocessedIdentifiers": []}

    def _batch_write(self, call: Call) -> Params:
        errors: list[Params] = []
        unprocessed: list[Params] = []
        for entry in call.params["Entries"]:
            if self._services.faults.take_unprocessed():
                unprocessed.append(entry)
                continue
            try:
                self._write(
                    call.region, {**entry, "TtlDuration": entry.get("TtlDuration") or call.params.get("TtlDuration")}
                )
            except ApiError as error:
                if error.code == "ResourceNotFound":
                    raise
                errors.append({"Entry": entry, "ErrorCode": error.code, "ErrorMessage": error.message})
        return {"Errors": errors, "UnprocessedEntries": unprocessed}

    def _online_group(self, region: str, name: str) -> FeatureGroup:
        group = self._groups.find(region, name)
        require_created(group)
        if not group.online:
            raise _invalid(f"FeatureGroup {group.name} has no online store.")
        return group


def _values(group: FeatureGroup, record: list[Params]) -> dict[str, str]:
    values: dict[str, str] = {}
    for feature in record:
        name, value = feature["FeatureName"], feature.get("ValueAsString")
        if name not in group.types:
            raise _invalid(f"FeatureGroup {group.name} has no feature {name}.")
        if name in values:
            raise _invalid(f"Feature {name} is given twice.")
        if value is None:
            raise _invalid(f"Feature {name} has no ValueAsString.")
        _check_type(name, value, group.types[name])
        values[name] = value
    for name in (group.identifier, group.event_time):
        if not values.get(name):
            raise _invalid(f"The record has no value for {name}.")
    if sum(len(name) + len(value) for name, value in values.items()) > _RECORD_BYTES:
        raise _invalid(f"The record is larger than {_RECORD_BYTES} bytes.")
    return values


def _check_type(name: str, value: str, kind: str) -> None:
    convert: Any = {"Integral": int, "Fractional": float, "String": str}[kind]
    try:
        convert(value)
    except ValueError as error:
        raise _invalid(f"The value {value!r} of feature {name} is not of type {kind}.") from error


def _stores(group: FeatureGroup, wanted: list[str] | None) -> list[str]:
    present = [n for n, there in (("OnlineStore", group.online), ("OfflineStore", group.offline)) if there]
    for store in wanted or []:
        if store not in present:
            raise _invalid(f"FeatureGroup {group.name} has no {store}.")
    return wanted or present


def _live(group: FeatureGroup, identifier: str) -> OnlineRecord | None:
    with group.lock:
        record = group.records.get(identifier)
    if record is None or record.deleted or (record.expires is not None and record.expires < time.time()):
        return None
    return record


def _shown(group: FeatureGroup, record: OnlineRecord | None, names: list[str] | None, expiry: str | None) -> Params:
    for name in names or []:
        if name not in group.types:
            raise _invalid(f"FeatureGroup {group.name} has no feature {name}.")
    if record is None:
        return {}
    chosen = names or [name for name in group.types if name in record.values]
    answer: Params = {
        "Record": [{"FeatureName": n, "ValueAsString": record.values[n]} for n in chosen if n in record.values]
    }
    if expiry == "Enabled":
        stamp = record.expires
        answer["ExpiresAt"] = datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if stamp else "null"
    return answer


def _invalid(message: str) -> ApiError:
    return ApiError("ValidationError", f"Validation Error: {message}")
