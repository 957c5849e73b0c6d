"""Feature groups: definitions and life cycle."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.sagemaker_emulator.common import (
    ACCOUNT,
    Call,
    Handler,
    Listing,
    Params,
    arn,
    catalog_config,
    list_page,
    name_of,
    now,
    pick,
)
from tests.sagemaker_emulator.errors import ApiError, in_use, not_emulated, not_found, validation
from tests.sagemaker_emulator.iam_requests import store_accesses
from tests.sagemaker_emulator.iceberg_tables import IcebergTables
from tests.sagemaker_emulator.services import Services

_ECHOED = ("FeatureGroupName", "RecordIdentifierFeatureName", "EventTimeFeatureName", "RoleArn", "Description",
           "OnlineStoreConfig", "ThroughputConfig")  # fmt: skip
_RESERVED = ("is_deleted", "write_time", "api_invocation_time")
_LISTING = Listing("FeatureGroupSummaries", "FeatureGroupName", "FeatureGroupStatus", order_default="Ascending")
_LIMIT_FEATURES = 2500


@dataclass
class OnlineRecord:
    """Latest record of one identifier in the online store."""

    event_time: float
    values: dict[str, str]
    deleted: bool = False
    expires: float | None = None


@dataclass
class FeatureGroup:
    """One feature group."""

    request: Params
    region: str
    delay: float
    created: float = field(default_factory=now)
    ready_at: float = 0.0
    updating_until: float = 0.0
    updated: bool = False
    update_failure: str | None = None
    table_pending: bool = False
    deleted_at: float | None = None
    blocked_reason: str | None = None
    failure: str | None = None
    records: dict[str, OnlineRecord] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.ready_at = time.monotonic() + self.delay
        self.name: str = self.request["FeatureGroupName"]
        self.arn = arn(self.region, "feature-group", self.name)
        self.types: dict[str, str] = {d["FeatureName"]: d["FeatureType"] for d in self.request["FeatureDefinitions"]}
        self.identifier: str = self.request["RecordIdentifierFeatureName"]
        self.event_time: str = self.request["EventTimeFeatureName"]

    @property
    def online(self) -> bool:
        """Whether there is an online store."""
        return bool(self.request.get("OnlineStoreConfig", {}).get("EnableOnlineStore"))

    @property
    def offline(self) -> bool:
        """Whether there is an offline store."""
        return "OfflineStoreConfig" in self.request

    @property
    def data_catalog(self) -> Params | None:
        """Where the Iceberg table of its offline store is; None if it has none."""
        config = self.request.get("OfflineStoreConfig", {})
        if config.get("TableFormat") != "Iceberg":
            return None
        return catalog_config(self.name, self.created, config.get("DataCatalogConfig"))

    @property
    def status(self) -> str:
        """Creating, Created, CreateFailed or Deleting."""
        if self.deleted_at is not None:
            return "Deleting"
        if self.table_pending or time.monotonic() < self.ready_at:
            return "Creating"
        return "CreateFailed" if self.failure else "Created"

    @property
    def resolved_uri(self) -> str:
        """Where the offline store lies."""
        base = self.request["OfflineStoreConfig"]["S3StorageConfig"]["S3Uri"].rstrip("/")
        return f"{base}/{ACCOUNT}/sagemaker/{self.region}/offline-store/{self.name}-{int(self.created)}/data"

    def block(self, reason: str) -> None:
        """Show that the offline store cannot be written."""
        self.blocked_reason = reason[:300]

    def describe(self) -> Params:
        """DescribeFeatureGroup's answer."""
        answer: Params = pick(self.request, _ECHOED)
        answer |= {
            "FeatureGroupArn": self.arn,
            "FeatureDefinitions": self.request["FeatureDefinitions"],
            "CreationTime": self.created,
            "FeatureGroupStatus": self.status,
            "NextToken": "",
        }
        if answer["FeatureGroupStatus"] == "CreateFailed":
            answer["FailureReason"] = self.failure
        if self.offline:
            config = {**self.request["OfflineStoreConfig"]}
            storage = {**config["S3StorageConfig"], "ResolvedOutputS3Uri": self.resolved_uri}
            answer["OfflineStoreConfig"] = {**config, "S3StorageConfig": storage}
            if self.data_catalog:
                answer["OfflineStoreConfig"]["DataCatalogConfig"] = self.data_catalog
            answer["OfflineStoreStatus"] = {"Status": "Active"}
            if self.blocked_reason:
                answer["OfflineStoreStatus"] = {"Status": "Blocked", "BlockedReason": self.blocked_reason}
        if self.updated:
            busy = time.monotonic() < self.updating_until
            answer["LastUpdateStatus"] = {"Status": "InProgress" if busy else "Successful"}
            if self.update_failure and not busy:
                answer["LastUpdateStatus"] = {"Status": "Failed", "FailureReason": self.update_failure}
        return answer


class FeatureGroups:
    """The feature-group part of the control API."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.tables = IcebergTables(services)
        self._groups: dict[tuple[str, str], FeatureGroup] = {}
        self._lock = threading.Lock()

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateFeatureGroup": self._create,
            "DescribeFeatureGroup": lambda call: self.find(call.region, call.params["FeatureGroupName"]).describe(),
            "ListFeatureGroups": self._list,
            "UpdateFeatureGroup": self._update,
            "DeleteFeatureGroup": self._delete,
        }

    def find(self, region: str, name_or_arn: str) -> FeatureGroup:
        """A group by name or ARN."""
        name = name_of(name_or_arn)
        with self._lock:
            self._purge()
            group = self._groups.get((region, name))
            if group is None and name_or_arn.startswith("arn:"):
                group = next((g for g in self._groups.values() if g.arn == name_or_arn), None)
        if group is None:
            raise not_found(f"Resource Not Found: Amazon SageMaker can't find a FeatureGroup with name {name}")
        return group

    def appender(self, group: FeatureGroup) -> Callable[[Any], None] | None:
        """What appends rows to the group's Iceberg table; None if it has none."""
        config, role = group.data_catalog, group.request.get("RoleArn")
        if config is None:
            return None
        return lambda rows: self.tables.append(config, rows, group.region, role)

    def _create(self, call: Call) -> Params:
        check_feature_group(call.params)
        key = (call.region, call.params["FeatureGroupName"])
        with self._lock:
            self._purge()
            if key in self._groups:
                raise in_use(
                    f"Resource Already Exists: FeatureGroup with name {key[1]} already exists. Choose a different name."
                )
            group = FeatureGroup(dict(call.params), call.region, self._services.settings.feature_group_delay)
            role = call.params.get("RoleArn")
            refused = group.offline and not self._services.allows(role, store_accesses(group.resolved_uri))
            if refused or self._services.faults.take_failed_feature_group():
                group.failure = "The execution role cannot write to the offline store's S3 location."
            elif group.data_catalog:
                group.table_pending = True
                self._services.spawn(f"table-of-{group.name}", lambda: self._create_table(group))
            self._groups[key] = group
        self._services.tag(group.arn, call.params.get("Tags"))
        return {"FeatureGroupArn": group.arn}

    def _create_table(self, group: FeatureGroup) -> None:
        assert group.data_catalog is not None
        location, role = group.resolved_uri.removesuffix("/data"), group.request.get("RoleArn")
        group.failure = "The Iceberg table could not be created."
        try:
            group.failure = self.tables.create(
                group.data_catalog, location, group.types, group.event_time, group.region, role
            )
        finally:
            group.table_pending = False

    def _update(self, call: Call) -> Params:
        group = self.find(call.region, call.params["FeatureGroupName"])
        for member in ("OnlineStoreConfig", "ThroughputConfig"):
            if call.params.get(member):
                raise not_emulated(f"UpdateFeatureGroup with {member}")
        additions = call.params.get("FeatureAdditions", [])
        for addition in additions:
            if addition["FeatureName"] in group.types:
                raise validation(f"Feature {addition['FeatureName']} already exists in FeatureGroup {group.name}.")
        _check_definitions(additions)
        with group.lock:
            if group.status != "Created" or time.monotonic() < group.updating_until:
                raise validation(f"FeatureGroup {group.name} is not in a state that allows updates.")
            group.updated, group.updating_until, group.update_failure = True, math.inf, None
        types = {d["FeatureName"]: d["FeatureType"] for d in additions}
        try:
            if group.data_catalog:
                role = group.request.get("RoleArn")
                group.update_failure = self.tables.add_columns(group.data_catalog, types, group.region, role)
            if group.update_failure is None:
                with group.lock:
                    group.request["FeatureDefinitions"] = [*group.request["FeatureDefinitions"], *additions]
                    group.types |= types
        finally:
            group.updating_until = time.monotonic() + self._services.settings.feature_group_delay
        return {"FeatureGroupArn": group.arn}

    def _delete(self, call: Call) -> Params:
        group = self.find(call.region, call.params["FeatureGroupName"])
        group.deleted_at = time.monotonic() + self._services.settings.feature_group_delay
        return {}

    def _list(self, call: Call) -> Params:
        with self._lock:
            self._purge()
            groups = [group for group in self._groups.values() if group.region == call.region]
        items: list[dict[str, Any]] = [
            pick(group.describe(), (
                "FeatureGroupName", "FeatureGroupArn", "CreationTime", "FeatureGroupStatus", "OfflineStoreStatus",
            ))
            for group in groups
        ]  # fmt: skip
        if wanted := call.params.get("FeatureGroupStatusEquals"):
            items = [item for item in items if item["FeatureGroupStatus"] == wanted]
        return list_page(call.params, items, _LISTING)

    def _purge(self) -> None:
        gone = [k for k, g in self._groups.items() if g.deleted_at is not None and g.deleted_at < time.monotonic()]
        for key in gone:
            self._services.tags.pop(self._groups.pop(key).arn, None)


def check_feature_group(params: Params) -> None:
    """The rules that are not in the service model, and what is not emulated."""
    definitions = params["FeatureDefinitions"]
    _check_definitions(definitions)
    types = {d["FeatureName"]: d["FeatureType"] for d in definitions}
    if len(types) != len(definitions):
        raise validation("Validation Error: feature names must be unique.")
    for member in ("RecordIdentifierFeatureName", "EventTimeFeatureName"):
        if params[member] not in types:
            raise validation(f"Validation Error: {member} {params[member]} is not among the FeatureDefinitions.")
    if types[params["EventTimeFeatureName"]] not in ("String", "Fractional"):
        raise validation("Validation Error: the event time feature must be of type String or Fractional.")
    online = params.get("OnlineStoreConfig", {})
    if online.get("StorageType", "Standard") != "Standard":
        raise not_emulated("the InMemory online store")
    offline = params.get("OfflineStoreConfig")
    if not online.get("EnableOnlineStore") and not offline:
        raise validation("Validation Error: at least one of the online and the offline store must be configured.")
    if offline:
        if offline.get("TableFormat") == "Iceberg":
            # What SageMaker makes of these is documented nowhere.
            if types[params["EventTimeFeatureName"]] != "String":
                raise not_emulated("Iceberg tables of groups whose event time is not a String")
            if offline.get("DisableGlueTableCreation"):
                raise not_emulated("Iceberg tables without Glue")
        if not params.get("RoleArn"):
            raise validation("Validation Error: RoleArn is required with an OfflineStoreConfig.")


def _check_definitions(definitions: list[Params]) -> None:
    if len(definitions) > _LIMIT_FEATURES:
        raise validation(f"Validation Error: at most {_LIMIT_FEATURES} features.")
    for definition in definitions:
        name = definition.get("FeatureName")
        if not name or not definition.get("FeatureType"):
            raise validation("Validation Error: FeatureName and FeatureType are required.")
        if name.lower() in _RESERVED:
            raise validation(f"Validation Error: feature name {name} is reserved.")
        if definition.get("CollectionType"):
            raise not_emulated("collection features")


def require_created(group: FeatureGroup) -> None:
    """Refuse records while the group is not ready."""
    if group.status != "Created":
        raise ApiError(
            "ValidationError",
            f"Validation Error: FeatureGroup {group.name} is in status {group.status}; records need status Created.",
        )
