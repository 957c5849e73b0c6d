"""The feature store on SageMaker: feature groups whose offline stores are written directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, field_validator

from resources.aws.calls import aws_client
from resources.aws.ownership import created_here, owned, root_tags
from resources.aws.request_validation import InvalidJobRequest, check_request
from resources.feature_store.base import FeatureStore, store_item
from resources.feature_store.feature_groups import FeatureGroups, place_of
from resources.inventory import NotOwned, OwnedItem
from step_scripts.parameters import IngestionTarget, OnlineTarget
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from step_scripts.feature_store.online_client import OnlineClient

_RECORD_ID, _EVENT_TIME = "record_id", "event_time"
_COMPARISONS = 2


class SageMakerFeatureStore(FeatureStore):
    """SageMaker feature groups below one s3:// prefix: `<root>/<group>` holds the offline store.

    The offline store is the Iceberg table that SageMaker makes in Glue, of its three types. Events are appended to it
    directly, one snapshot an ingestion. With `online_store`, the latest event of each record is in the online store as
    well, before it is committed.
    """

    role_arn: str = Field(description="Role that SageMaker uses to reach the offline store.")
    region_name: str | None = Field(default=None, description="AWS region. Empty: boto3's.")
    online_store: bool = Field(default=False, description="Whether groups have an online store. Fixed at creation.")
    offline_kms_key_id: str | None = Field(default=None, description="KMS key for the offline store.")
    online_kms_key_id: str | None = Field(default=None, description="KMS key for the online store.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of new groups, beside the project's own.")
    wait_seconds: float = Field(
        default=900.0, gt=0, description="How long a group may take to be created, changed or deleted; seconds."
    )
    poll_seconds: float = Field(default=2.0, gt=0, description="Shortest interval between two polls of a group.")
    retry_timeout_seconds: float = Field(
        default=900.0, gt=0, description="How long calls that AWS throttles or does not answer are repeated; seconds."
    )
    calls_in_flight: int = Field(
        default=16, ge=1, le=256, description="Calls to the online store at the same time, of each Ray actor."
    )

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        if isinstance(root, dg.EnvVar):
            return root
        if not root.startswith("s3://"):
            raise ValueError(f"root must be an s3:// prefix that SageMaker can reach, not {root!r}")
        return root.rstrip("/")

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Check the configured values before the first group is made. Raises `InvalidJobRequest` naming each."""
        check_request("CreateFeatureGroup", self._request("group", {_RECORD_ID: "String", _EVENT_TIME: "String"}))

    def ensure_group(self, name: str, table: TableSpec) -> IngestionTarget:
        """Create the group and wait for it, or add columns that may be empty, or check that it fits.

        Returns the step's `target`. Raises `StepError`, naming the columns, for another schema, and for a group that
        is not below `root`, cannot be created, or takes too long.
        """
        from step_scripts.feature_store.online_client import feature_types

        types = feature_types(table)
        self._store().check_table(name, table)
        request = self._request(name, types)
        try:
            check_request("CreateFeatureGroup", request)
        except InvalidJobRequest as error:
            raise StepError(f"feature group {name} cannot be made for table {table.name!r}: {error}") from error
        described = self._groups().ensured(request, partial(self._missing_features, table, types))
        glue_table = self._groups().table(described)
        data_uri = described["OfflineStoreConfig"]["S3StorageConfig"]["ResolvedOutputS3Uri"].rstrip("/")
        folder = self._store().folder(name)
        info = folder.info()
        if info is not None and info.data_uri != data_uri and folder.state().last:
            raise StepError(
                f"feature group {name} has been deleted and created again by others: its description at {folder.uri} "
                f"is that of {info.data_uri}, its data are now at {data_uri}. Delete the group here too, which removes "
                "its records for good, or use another group name"
            )
        self._store().ensure_group(name, table, data_uri, glue_table)
        online = OnlineTarget(
            group=name,
            region_name=self.region_name,
            in_flight=self.calls_in_flight,
            retry_timeout_seconds=self.retry_timeout_seconds,
        )
        return IngestionTarget(root=self.root, online=online if self.online_store else None)

    def get_record(self, name: str, record_id: str) -> dict[str, Any] | None:
        """The latest state of one record, from the online store if there is one; None if unknown or deleted.

        The online store holds event times to the millisecond.
        """
        from step_scripts.feature_store.online_client import decoded_record

        if not self.online_store:
            return super().get_record(name, record_id)
        table, found = self._store().table(name), self._online(name).read([record_id])
        return decoded_record(found[record_id], table) if found else None

    def compare_online(self, name: str, count: int) -> tuple[int, list[str]] | None:
        """See `FeatureStore.compare_online`. Raises `StepError` if the online store does not answer."""
        from step_scripts.feature_store.online_client import encoded_records

        if not self.online_store:
            return None
        store, online = self._store(), self._online(name)
        events, differing = store.sample(name, count), list[str]()
        for _ in range(_COMPARISONS):
            expected: dict[str, Any] = dict.fromkeys(events["record_id"])
            live = events.filter(~events["is_deleted"])
            expected |= {record[_RECORD_ID]: record for record in encoded_records(live, store.table(name))}
            found = online.read(list(expected))
            differing = sorted(i for i, features in expected.items() if found.get(i) != features)
            if not differing:
                break
            events = store.sample(name, count)  # a run may have ingested between the two readings
        return events.height, differing

    def delete_group(self, name: str) -> None:
        """Delete the group, its table, its offline store and its commit log, and wait, if it is there.

        Raises `StepError`, having changed nothing, for a feature group that is not below `root`.
        """
        folder = self._store().folder(name)
        described = self._groups().describe(name)
        if described is not None:
            self._check_place(name, described, check_stores=False)
            self._groups().delete(name)
        if storage.exists(folder.uri):
            folder.remove()

    def inventory(self) -> Sequence[OwnedItem]:
        """See `FeatureStore.inventory`. Groups below `root`, also those that only SageMaker or only S3 still has."""
        store, groups = self._store(), self._groups()
        unfinished = store.unfinished_removals()
        described = {name: groups.describe(name) for name in {*store.groups(), *unfinished}}
        kind = ("list_feature_groups", "FeatureGroupSummaries", "FeatureGroupArn")
        for found, _ in created_here(groups.client, *kind, self.root):
            if (name := found["FeatureGroupName"]) not in described:
                described[name] = groups.describe(name)
        items = []
        for name, group in sorted(described.items()):
            arn = group["FeatureGroupArn"] if group and self._is_here(name, group) else None
            facts: dict[str, Any] = {"kind": "feature_group", "name": name}
            if store.folder(name).is_there():
                items.append(store_item(store, name, arn))
            elif group and arn:
                facts |= {"created_at": group["CreationTime"], "detail": group["FeatureGroupStatus"]}
                items.append(OwnedItem(location=arn, **facts))
            elif name in unfinished:
                facts |= {"discarded": True, "detail": "its removal is incomplete"}
                items.append(OwnedItem(location=unfinished[name], **facts))
        return items

    def remove(self, item: OwnedItem) -> None:
        """See `FeatureStore.remove`."""
        if item.kind != "feature_group":
            raise NotOwned(f"{item.location} is no feature group")
        try:
            self.delete_group(item.name)
        except StepError as error:
            described = self._groups().describe(item.name)
            if described is not None and not self._is_here(item.name, described):
                raise NotOwned(str(error)) from error
            raise

    def _missing_features(
        self, table: TableSpec, types: Mapping[str, str], described: Mapping[str, Any]
    ) -> list[dict[str, str]]:
        """Features of `table` that a group lacks, to be added.

        Raises `StepError`, naming each column and both types, if the group cannot be made to fit.
        """
        name = described["FeatureGroupName"]
        self._check_place(name, described)
        present = {d["FeatureName"]: d["FeatureType"] for d in described["FeatureDefinitions"]}
        dtypes = {column.name: f" ({column.dtype})" for column in table.columns}
        problems = [
            f"{column} is {types[column]}{dtypes.get(column, '')} in the table and {kind} in the feature group"
            for column, kind in present.items()
            if column in types and types[column] != kind
        ]
        problems += [f"{c} ({kind}) is missing in the table" for c, kind in present.items() if c not in types]
        roles = {"record identifier": ("RecordIdentifierFeatureName", _RECORD_ID)}
        roles["event time"] = ("EventTimeFeatureName", _EVENT_TIME)
        problems += [
            f"the {role} is {described[member]}, not {wanted}"
            for role, (member, wanted) in roles.items()
            if described[member] != wanted
        ]
        if problems:
            raise StepError(
                f"feature group {name} exists with another schema: {'; '.join(problems)}. Use another group name, "
                "delete the group, or add only columns that may be empty"
            )
        return [{"FeatureName": column, "FeatureType": kind} for column, kind in types.items() if column not in present]

    def _is_here(self, name: str, described: Mapping[str, Any]) -> bool:
        return place_of(described) == storage.join(self.root, name)

    def _client(self, service: str) -> Any:
        return aws_client(service, self.region_name, retry_seconds=self.retry_timeout_seconds)

    def _online(self, name: str) -> OnlineClient:
        from step_scripts.feature_store.online_client import OnlineClient

        return OnlineClient(self._client("sagemaker-featurestore-runtime"), name, self.retry_timeout_seconds)

    def _groups(self) -> FeatureGroups:
        clients = self._client("sagemaker"), self._client("glue")
        return FeatureGroups(*clients, self.wait_seconds, self.poll_seconds)

    def _request(self, name: str, types: Mapping[str, str]) -> dict[str, Any]:
        """CreateFeatureGroup's request."""
        place = {"S3Uri": storage.join(self.root, name)}
        if self.offline_kms_key_id:
            place["KmsKeyId"] = self.offline_kms_key_id
        request: dict[str, Any] = {
            "FeatureGroupName": name,
            "RecordIdentifierFeatureName": _RECORD_ID,
            "EventTimeFeatureName": _EVENT_TIME,
            "FeatureDefinitions": [{"FeatureName": n, "FeatureType": kind} for n, kind in types.items()],
            "OfflineStoreConfig": {"S3StorageConfig": place, "TableFormat": "Iceberg"},
            "RoleArn": self.role_arn,
            "Tags": owned(root_tags(self.root), self.tags),
        }
        if self.online_store:
            security = {"SecurityConfig": {"KmsKeyId": self.online_kms_key_id}} if self.online_kms_key_id else {}
            request["OnlineStoreConfig"] = {"EnableOnlineStore": True, **security}
        return request

    def _check_place(self, name: str, described: Mapping[str, Any], *, check_stores: bool = True) -> None:
        """Raise `StepError` for a group that is not this store's."""
        if not self._is_here(name, described):
            raise StepError(
                f"there is a feature group {name} already, whose offline store is {place_of(described) or 'off'} and "
                f"not below {self.root}: it is not this project's. Use another group name or root"
            )
        if check_stores and described["OfflineStoreConfig"].get("TableFormat") != "Iceberg":
            raise StepError(
                f"the offline store of feature group {name} is not in Iceberg format, as those of earlier versions of "
                "this project. SageMaker cannot change that: use another group name, or delete the group, and ingest "
                "its sources again"
            )
        online = bool(described.get("OnlineStoreConfig", {}).get("EnableOnlineStore"))
        if check_stores and online != self.online_store:
            raise StepError(
                f"feature group {name} has {'an' if online else 'no'} online store, the configuration says "
                f"online_store = {self.online_store}. SageMaker cannot change that: set online_store = {online}, use "
                "another group name, or delete the group"
            )
