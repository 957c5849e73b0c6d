"""Feature groups and the feature-store runtime."""

import io
import time
from typing import Any

import pytest

from tests.sagemaker_emulator.testing import ROLE, Aws
from tests.waiting import until

pq = pytest.importorskip("pyarrow.parquet")


def create(aws: Aws, name: str, online: bool = True, offline: bool = True) -> dict[str, Any]:

    request: dict[str, Any] = {
        "FeatureGroupName": name,
        "RecordIdentifierFeatureName": "id",
        "EventTimeFeatureName": "at",
        "RoleArn": ROLE,
        "FeatureDefinitions": [
            {"FeatureName": "id", "FeatureType": "String"},
            {"FeatureName": "at", "FeatureType": "String"},
            {"FeatureName": "price", "FeatureType": "Fractional"},
            {"FeatureName": "rooms", "FeatureType": "Integral"},
        ],
    }
    if online:
        request["OnlineStoreConfig"] = {"EnableOnlineStore": True}
    if offline:
        request["OfflineStoreConfig"] = {"S3StorageConfig": {"S3Uri": aws.uri("store")}}
    aws.sagemaker.create_feature_group(**request)
    first = aws.sagemaker.describe_feature_group(FeatureGroupName=name)
    assert first["FeatureGroupStatus"] == "Creating"

    def describe() -> dict[str, Any]:
        return aws.sagemaker.describe_feature_group(FeatureGroupName=name)

    until(lambda: describe()["FeatureGroupStatus"] == "Created")
    return describe()


def record(identifier: str, price: float, at: str = "2024-05-01T10:00:00Z") -> list[dict[str, str]]:
    values = {"id": identifier, "at": at, "price": str(price), "rooms": "3"}
    return [{"FeatureName": name, "ValueAsString": value} for name, value in values.items()]


def price_of(answer: dict[str, Any]) -> float | None:
    values = {f["FeatureName"]: f["ValueAsString"] for f in answer.get("Record", [])}
    return float(values["price"]) if values else None


def test_put_get_delete_and_offline_layout(aws: Aws) -> None:
    group = create(aws, "houses")
    runtime = aws.client("sagemaker-featurestore-runtime")
    runtime.put_record(FeatureGroupName="houses", Record=record("a", 1.5))
    runtime.put_record(FeatureGroupName="houses", Record=record("a", 2.5, "2024-05-01T12:00:00Z"))
    runtime.put_record(FeatureGroupName="houses", Record=record("a", 0.5, "2023-01-01T00:00:00Z"))
    get = runtime.get_record(FeatureGroupName="houses", RecordIdentifierValueAsString="a")
    assert price_of(get) == 2.5
    only = runtime.get_record(FeatureGroupName="houses", RecordIdentifierValueAsString="a", FeatureNames=["rooms"])
    assert only["Record"] == [{"FeatureName": "rooms", "ValueAsString": "3"}]
    runtime.delete_record(
        FeatureGroupName="houses", RecordIdentifierValueAsString="a", EventTime="2024-05-02T00:00:00Z"
    )
    assert "Record" not in runtime.get_record(FeatureGroupName="houses", RecordIdentifierValueAsString="a")
    base = group["OfflineStoreConfig"]["S3StorageConfig"]["ResolvedOutputS3Uri"]
    prefix = base.removeprefix(aws.uri())
    keys = until(lambda: len(found := aws.keys(prefix)) == 4 and found)
    parts = [key.removeprefix(prefix + "/") for key in keys]
    assert [p.rsplit("/", 1)[0] for p in parts] == [
        "year=2023/month=01/day=01/hour=00", "year=2024/month=05/day=01/hour=10",
        "year=2024/month=05/day=01/hour=12", "year=2024/month=05/day=02/hour=00",
    ]  # fmt: skip
    assert parts[0].rsplit("/", 1)[1].startswith("20230101T000000Z_")
    rows = pq.read_table(io.BytesIO(aws.get(keys[3]))).to_pylist()
    assert rows[0]["is_deleted"] is True
    assert rows[0]["price"] is None
    assert {"write_time", "api_invocation_time"} <= rows[0].keys()


def test_batch_write_limits_errors_and_unprocessed(aws: Aws) -> None:
    create(aws, "batch")
    runtime = aws.client("sagemaker-featurestore-runtime")

    def entries(count: int) -> list[dict[str, Any]]:
        return [{"FeatureGroupName": "batch", "Record": record(f"r{n}", n)} for n in range(count)]

    assert runtime.batch_write_record(Entries=entries(25))["Errors"] == []
    with pytest.raises(runtime.exceptions.ClientError, match="Member must have length less than or equal to 25"):
        runtime.batch_write_record(Entries=entries(26))
    bad = entries(2)
    bad[1]["Record"][2]["ValueAsString"] = "cheap"
    answer = runtime.batch_write_record(Entries=bad)
    assert [e["Entry"] for e in answer["Errors"]] == [bad[1]]
    assert answer["Errors"][0]["ErrorCode"] == "ValidationError"
    aws.faults.unprocessed_records(3)
    answer = runtime.batch_write_record(Entries=entries(5))
    assert answer["UnprocessedEntries"] == entries(3)
    assert runtime.batch_write_record(Entries=answer["UnprocessedEntries"])["UnprocessedEntries"] == []
    wanted = [{"FeatureGroupName": "batch", "RecordIdentifiersValueAsString": ["r1", "r24", "none"]}]
    found = runtime.batch_get_record(Identifiers=wanted)["Records"]
    assert [r["RecordIdentifierValueAsString"] for r in found] == ["r1", "r24"]


def test_blocked_offline_store_and_time_to_live(aws: Aws) -> None:
    create(aws, "blocked")
    aws.s3.delete_bucket(Bucket=aws.bucket)
    runtime = aws.client("sagemaker-featurestore-runtime")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    runtime.put_record(
        FeatureGroupName="blocked", Record=record("a", 1, now), TtlDuration={"Unit": "Seconds", "Value": 2}
    )

    def status() -> str:
        return aws.sagemaker.describe_feature_group(FeatureGroupName="blocked")["OfflineStoreStatus"]["Status"]

    def found() -> bool:
        return "Record" in runtime.get_record(FeatureGroupName="blocked", RecordIdentifierValueAsString="a")

    assert found()
    until(lambda: status() == "Blocked")
    until(lambda: not found())


def test_group_life_cycle(aws: Aws) -> None:
    create(aws, "cycle", online=False)
    runtime = aws.client("sagemaker-featurestore-runtime")
    with pytest.raises(aws.sagemaker.exceptions.ResourceInUse, match="already exists"):
        create(aws, "cycle")
    with pytest.raises(runtime.exceptions.ClientError, match="no online store"):
        runtime.get_record(FeatureGroupName="cycle", RecordIdentifierValueAsString="a")
    with pytest.raises(runtime.exceptions.ClientError, match="has no feature size"):
        runtime.put_record(FeatureGroupName="cycle", Record=[{"FeatureName": "size", "ValueAsString": "1"}])
    aws.sagemaker.update_feature_group(
        FeatureGroupName="cycle", FeatureAdditions=[{"FeatureName": "size", "FeatureType": "Integral"}]
    )

    def describe() -> dict[str, Any]:
        return aws.sagemaker.describe_feature_group(FeatureGroupName="cycle")

    assert describe()["LastUpdateStatus"]["Status"] == "InProgress"
    until(lambda: describe()["LastUpdateStatus"]["Status"] == "Successful")
    assert describe()["FeatureDefinitions"][-1]["FeatureName"] == "size"
    listed = aws.sagemaker.list_feature_groups(NameContains="cycle")["FeatureGroupSummaries"]
    assert [g["FeatureGroupStatus"] for g in listed] == ["Created"]
    aws.sagemaker.delete_feature_group(FeatureGroupName="cycle")
    time.sleep(0.3)
    with pytest.raises(aws.sagemaker.exceptions.ResourceNotFound):
        describe()
