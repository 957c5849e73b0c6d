"""Offline stores as Iceberg tables: what SageMaker makes, and pyiceberg's GlueCatalog on it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from pyiceberg.catalog.glue import GlueCatalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table import Table
from pyiceberg.transforms import TruncateTransform

from tests.sagemaker_emulator.testing import ROLE, Aws
from tests.waiting import until

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def create(aws: Aws, name: str, *, online: bool = False, **offline: Any) -> dict[str, Any]:
    request: dict[str, Any] = {
        "FeatureGroupName": name,
        "RecordIdentifierFeatureName": "record_id",
        "EventTimeFeatureName": "event_time",
        "RoleArn": ROLE,
        "FeatureDefinitions": [
            {"FeatureName": "record_id", "FeatureType": "String"},
            {"FeatureName": "event_time", "FeatureType": "String"},
            {"FeatureName": "PRICE", "FeatureType": "Fractional"},
            {"FeatureName": "ROOMS", "FeatureType": "Integral"},
        ],
        "OfflineStoreConfig": {
            "S3StorageConfig": {"S3Uri": aws.uri("store")},
            "TableFormat": "Iceberg",
            **offline,
        },
    }
    if online:
        request["OnlineStoreConfig"] = {"EnableOnlineStore": True}
    aws.sagemaker.create_feature_group(**request)
    return until(lambda: (d := describe(aws, name))["FeatureGroupStatus"] != "Creating" and d)


def describe(aws: Aws, name: str) -> dict[str, Any]:
    return aws.sagemaker.describe_feature_group(FeatureGroupName=name)


def catalog(aws: Aws) -> GlueCatalog:
    """As a job opens it."""
    place = {"s3.endpoint": aws.emulator.endpoint_url, "s3.region": "us-east-1"}
    keys = {"s3.access-key-id": "testing", "s3.secret-access-key": "testing"}
    return GlueCatalog("glue", aws.client("glue"), **place, **keys)


def identifier(described: dict[str, Any]) -> tuple[str, str]:
    config = described["OfflineStoreConfig"]["DataCatalogConfig"]
    return config["Database"], config["TableName"]


def events(ids: Sequence[str], day: str = "2024-05-01", price: float = 1.0) -> pa.Table:
    count = len(ids)
    stamps = pa.array([NOON] * count, pa.timestamp("us", tz="UTC"))
    return pa.table({
        "record_id": list(ids), "event_time": [f"{day}T12:00:00.000Z"] * count, "PRICE": [price] * count,
        "ROOMS": pa.array([3] * count, pa.int64()), "write_time": stamps, "api_invocation_time": stamps,
        "is_deleted": [False] * count,
    })  # fmt: skip


def ids(table: Table, snapshot: int | None = None) -> list[str]:
    return sorted(table.scan(snapshot_id=snapshot).to_arrow()["record_id"].to_pylist())


def test_a_group_gets_a_table_that_athena_would_read(aws: Aws) -> None:
    described = create(aws, "Houses-a")
    config = described["OfflineStoreConfig"]
    database, name = identifier(described)
    assert config["TableFormat"] == "Iceberg"
    assert config["DataCatalogConfig"]["Catalog"] == "AwsDataCatalog"
    assert (database, name) == ("sagemaker_featurestore", f"houses_a_{int(described['CreationTime'].timestamp())}")
    glue = aws.client("glue").get_table(DatabaseName=database, Name=name)["Table"]
    resolved = config["S3StorageConfig"]["ResolvedOutputS3Uri"]
    location = resolved.removesuffix("/data")
    assert glue["TableType"] == "EXTERNAL_TABLE"
    assert glue["Parameters"]["table_type"] == "ICEBERG"
    assert glue["Parameters"]["metadata_location"].startswith(f"{location}/metadata/")
    assert glue["StorageDescriptor"]["Location"] == location
    assert {c["Name"]: c["Type"] for c in glue["StorageDescriptor"]["Columns"]} == {
        "record_id": "string", "event_time": "string", "PRICE": "double", "ROOMS": "bigint",
        "write_time": "timestamp", "api_invocation_time": "timestamp", "is_deleted": "boolean",
    }  # fmt: skip
    table = catalog(aws).load_table((database, name))
    assert table.current_snapshot() is None
    [field] = table.spec().fields
    assert (field.name, field.transform) == ("event_time_trunc", TruncateTransform(10))
    table.append(events(["a"]))
    table.append(events(["b"], "2024-05-02"))
    assert ids(table) == ["a", "b"]
    files = {file.file.file_path for file in table.scan().plan_files()}
    assert {path.split("event_time_trunc=")[1].split("/")[0] for path in files} == {"2024-05-01", "2024-05-02"}
    assert all(path.startswith(f"{resolved}/") for path in files)
    # Time travel, and a reader that opens the table by what Glue says of it.
    first, last = (snapshot.snapshot_id for snapshot in table.snapshots())
    fresh = catalog(aws).load_table((database, name))
    assert (ids(fresh, first), ids(fresh, last)) == (["a"], ["a", "b"])
    glue = aws.client("glue").get_table(DatabaseName=database, Name=name)["Table"]
    assert glue["Parameters"]["metadata_location"] == fresh.metadata_location
    assert glue["VersionId"] == "3"


def test_the_place_in_the_catalog_can_be_chosen_and_is_taken_once(aws: Aws) -> None:
    place = {"Catalog": "AwsDataCatalog", "Database": "Sales", "TableName": aws.bucket}
    described = create(aws, "chosen", DataCatalogConfig=place)
    assert described["OfflineStoreConfig"]["DataCatalogConfig"] == place
    assert catalog(aws).load_table(("sales", aws.bucket)).current_snapshot() is None
    assert "already exists in AWS Glue" in create(aws, "chosen-again", DataCatalogConfig=place)["FailureReason"]


def test_added_features_are_columns_and_a_deleted_group_leaves_its_table(aws: Aws) -> None:
    described = create(aws, "wider")
    table = catalog(aws).load_table(identifier(described))
    table.append(events(["a"]))
    aws.sagemaker.update_feature_group(
        FeatureGroupName="wider", FeatureAdditions=[{"FeatureName": "GARDEN", "FeatureType": "Fractional"}]
    )
    until(lambda: describe(aws, "wider")["LastUpdateStatus"]["Status"] == "Successful")
    table.refresh()
    table.append(events(["b"]).append_column("GARDEN", [[2.5]]))
    rows = {row["record_id"]: row["GARDEN"] for row in table.scan().to_arrow().to_pylist()}
    assert rows == {"a": None, "b": 2.5}
    aws.sagemaker.delete_feature_group(FeatureGroupName="wider")
    until(lambda: not aws.sagemaker.list_feature_groups(NameContains="wider")["FeatureGroupSummaries"])
    assert ids(catalog(aws).load_table(identifier(described))) == ["a", "b"]


def test_an_update_that_the_table_refuses_fails(aws: Aws) -> None:
    described = create(aws, "clash")
    with catalog(aws).load_table(identifier(described)).update_schema() as update:
        update.add_column("GARDEN", table_type())
    addition = [{"FeatureName": "GARDEN", "FeatureType": "Fractional"}]
    aws.sagemaker.update_feature_group(FeatureGroupName="clash", FeatureAdditions=addition)
    found = until(lambda: (s := describe(aws, "clash")["LastUpdateStatus"])["Status"] != "InProgress" and s)
    assert found["Status"] == "Failed"
    assert "GARDEN" in found["FailureReason"]
    assert "GARDEN" not in str(describe(aws, "clash")["FeatureDefinitions"])


def table_type() -> Any:
    from pyiceberg.types import StringType

    return StringType()


def test_records_that_are_put_arrive_in_the_table(aws: Aws) -> None:
    described = create(aws, "put", online=True)
    runtime = aws.client("sagemaker-featurestore-runtime")

    def put(identity: str, time: str) -> None:
        values = {"record_id": identity, "event_time": time, "PRICE": "1.5"}
        record = [{"FeatureName": name, "ValueAsString": value} for name, value in values.items()]
        runtime.put_record(FeatureGroupName="put", Record=record)

    put("a", "2024-05-01T10:00:00Z")
    put("b", "2024-05-01T10:00:00.125Z")
    with pytest.raises(ClientError, match=r"not in the expected format, .*ss\.SSSZ"):
        put("c", "2024-05-01T10:00:00.000125Z")
    runtime.delete_record(FeatureGroupName="put", RecordIdentifierValueAsString="a", EventTime="2024-05-02T00:00:00Z")

    def stored() -> list[dict[str, Any]]:
        return catalog(aws).load_table(identifier(described)).scan().to_arrow().to_pylist()

    rows = until(lambda: len(found := stored()) == 3 and found)
    assert sorted((r["record_id"], r["event_time"], r["PRICE"], r["is_deleted"]) for r in rows) == [
        ("a", "2024-05-01T10:00:00Z", 1.5, False), ("a", "2024-05-02T00:00:00Z", None, True),
        ("b", "2024-05-01T10:00:00.125Z", 1.5, False),
    ]  # fmt: skip
    assert all(row["write_time"] >= row["api_invocation_time"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"OfflineStoreConfig": {"TableFormat": "Delta"}}, r"tableFormat.*enum value set: \[Default, Glue, Iceberg\]"),
        ({"OfflineStoreConfig": {"DataCatalogConfig": {"Catalog": "", "Database": "d", "TableName": "t"}}},
         "dataCatalogConfig.catalog' failed.*greater than or equal to 1"),
        ({"OfflineStoreConfig": {"DisableGlueTableCreation": True}}, "NotEmulated.*without Glue"),
        ({"EventTimeFeatureName": "PRICE"}, "NotEmulated.*event time is not a String"),
    ],
)  # fmt: skip
def test_what_sagemaker_does_not_know_is_refused(aws: Aws, changes: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {
        "FeatureGroupName": "refused", "RecordIdentifierFeatureName": "record_id",
        "EventTimeFeatureName": "event_time", "RoleArn": ROLE,
        "FeatureDefinitions": [
            {"FeatureName": name, "FeatureType": kind}
            for name, kind in {"record_id": "String", "event_time": "String", "PRICE": "Fractional"}.items()
        ],
    }  # fmt: skip
    offline = {"S3StorageConfig": {"S3Uri": aws.uri("store")}, "TableFormat": "Iceberg"}
    request |= changes | {"OfflineStoreConfig": offline | changes.get("OfflineStoreConfig", {})}
    with pytest.raises(ClientError, match=message):
        aws.client("sagemaker", config=Config(parameter_validation=False)).create_feature_group(**request)


# -- locking -------------------------------------------------------------------------------------------------------


def test_an_update_of_an_old_version_is_refused(aws: Aws) -> None:
    database, name = identifier(create(aws, "versions"))
    glue = aws.client("glue")
    table = glue.get_table(DatabaseName=database, Name=name)["Table"]
    assert table["VersionId"] == "1"
    table_input = {key: table[key] for key in ("Name", "TableType", "Parameters", "StorageDescriptor")}
    change = {"DatabaseName": database, "TableInput": table_input}
    glue.update_table(**change, VersionId="1")
    with pytest.raises(glue.exceptions.ConcurrentModificationException):
        glue.update_table(**change, VersionId="1")
    glue.update_table(**change, VersionId="2", SkipArchive=True)
    glue.update_table(**change)  # nobody asked for a lock
    versions = glue.get_table_versions(DatabaseName=database, TableName=name)["TableVersions"]
    assert sorted(version["VersionId"] for version in versions) == ["1", "3", "4"], "version 2 was not archived"
    with pytest.raises(glue.exceptions.EntityNotFoundException):
        glue.update_table(DatabaseName=database, TableInput={"Name": "nothing"}, VersionId="1")
    with pytest.raises(ClientError, match="'versionId' failed to satisfy constraint: Member must have length"):
        glue.update_table(**change, VersionId="v" * 256)


@pytest.fixture
def writers(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> tuple[Table, Table]:
    """Two writers of one table, each of which sees the table as it is before the other's first commit."""
    target = identifier(create(aws, f"writers-{aws.bucket[-6:]}"))
    both = threading.Barrier(2)
    update, waited = GlueCatalog._update_glue_table, threading.local()

    def update_together(self: GlueCatalog, *args: Any, **options: Any) -> None:
        if not getattr(waited, "once", False):
            waited.once = True
            both.wait(60)
        update(self, *args, **options)

    monkeypatch.setattr(GlueCatalog, "_update_glue_table", update_together)
    return catalog(aws).load_table(target), catalog(aws).load_table(target)


def append_together(writers: tuple[Table, Table]) -> list[BaseException]:
    errors: list[BaseException] = []

    def append(writer: Table, name: str) -> None:
        try:
            writer.append(events([name]))
        except CommitFailedException as error:
            errors.append(error)

    threads = [threading.Thread(target=append, args=each) for each in zip(writers, ("a", "b"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors


def test_a_stale_append_is_tried_again_and_nothing_is_lost(aws: Aws, writers: tuple[Table, Table]) -> None:
    assert append_together(writers) == []
    table = catalog(aws).load_table(writers[0].name())
    assert ids(table) == ["a", "b"]
    assert len(table.snapshots()) == 2


def test_without_retries_a_stale_append_fails_and_changes_nothing(
    aws: Aws, writers: tuple[Table, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    for writer in writers:
        monkeypatch.setitem(writer.metadata.properties, "commit.retry.num-retries", "0")
    [error] = append_together(writers)
    assert "concurrent update" in str(error)
    table = catalog(aws).load_table(writers[0].name())
    assert len(table.snapshots()) == len(ids(table)) == 1
