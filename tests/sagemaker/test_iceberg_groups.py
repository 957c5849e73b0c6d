"""Feature groups of the SageMaker feature store whose offline stores are Iceberg tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from resources.feature_store.feature_groups import FeatureGroups
from resources.feature_store.sagemaker import SageMakerFeatureStore
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.feature_store.online_client import feature_types
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.table.spec import ColumnSpec
from tests.feature_rows import TABLE
from tests.sagemaker.test_emulator_iceberg import catalog
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import ROLE, Aws


def store(aws: Aws, **changes: Any) -> SageMakerFeatureStore:
    options = {"poll_seconds": 0.05, "wait_seconds": 120, **changes}
    return SageMakerFeatureStore(root=aws.uri("features"), role_arn=ROLE, **options)


def glue_table(aws: Aws) -> str:
    """Database and name of the table that the group's description names."""
    info = OfflineStore(store(aws).root).folder("iced").info()
    assert info is not None
    return info.glue_table or ""


@pytest.fixture(autouse=True)
def _no_groups_left(aws: Aws, aws_environment: SageMakerEmulator) -> Iterator[None]:
    yield
    aws.faults.clear()
    aws.remove_feature_groups("iced")


def test_the_description_names_the_table_which_follows_the_groups_columns_and_goes_with_it(aws: Aws) -> None:
    target = store(aws).ensure_group("iced", TABLE)
    described = aws.sagemaker.describe_feature_group(FeatureGroupName="iced")
    config = described["OfflineStoreConfig"]["DataCatalogConfig"]
    named = glue_table(aws)
    assert named == f"{config['Database']}.{config['TableName']}"
    assert target.online is None
    assert {d["FeatureName"]: d["FeatureType"] for d in described["FeatureDefinitions"]}["event_time"] == "String"
    table = catalog(aws).load_table(named)
    assert [field.name for field in table.schema().fields] == [
        "record_id", "event_time", "PRICE", "ROOMS", "SOLD", "write_time", "api_invocation_time", "is_deleted",
    ]  # fmt: skip
    wider = TABLE.model_copy(
        update={"columns": (*TABLE.columns, ColumnSpec(name="GARDEN", dtype="float64", nullable=True))}
    )
    assert store(aws).ensure_group("iced", wider) == target
    assert str(table.refresh().schema().find_type("GARDEN")) == "double"
    assert glue_table(aws) == named
    store(aws).delete_group("iced")
    assert not aws.feature_tables("iced")
    assert not aws.keys("features")
    store(aws).ensure_group("iced", TABLE)
    assert "iced_" in glue_table(aws)


def test_a_group_of_another_format_is_refused(aws: Aws) -> None:
    features = [{"FeatureName": n, "FeatureType": t} for n, t in feature_types(TABLE).items()]
    aws.sagemaker.create_feature_group(
        FeatureGroupName="iced-not", RecordIdentifierFeatureName="record_id", EventTimeFeatureName="event_time",
        RoleArn=ROLE, FeatureDefinitions=features,
        OfflineStoreConfig={
            "S3StorageConfig": {"S3Uri": aws.uri("features/iced-not")}, "DisableGlueTableCreation": True,
        },
    )  # fmt: skip
    with pytest.raises(StepError, match=r"iced-not is not in Iceberg format, .*: use another group name, or delete"):
        store(aws).ensure_group("iced-not", TABLE)


def test_a_table_that_is_not_there_yet_is_awaited_and_one_that_was_dropped_is_missed(
    aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = store(aws).ensure_group("iced", TABLE)
    glue, (database, name) = aws.client("glue"), glue_table(aws).split(".")
    table = glue.get_table(DatabaseName=database, Name=name)["Table"]
    glue.delete_table(DatabaseName=database, Name=name)
    with pytest.raises(StepError, match=rf"its Iceberg table {database}\.{name} has not been in AWS Glue for 0 s"):
        store(aws, wait_seconds=0.2).ensure_group("iced", TABLE)
    find, fields = FeatureGroups._find_table, ("Name", "TableType", "Parameters", "StorageDescriptor")

    def find_and_appear(self: FeatureGroups, *place: Any) -> Any:
        if (found := find(self, *place)) is None:
            glue.create_table(DatabaseName=database, TableInput={field: table[field] for field in fields})
        return found

    with monkeypatch.context() as patched:
        patched.setattr(FeatureGroups, "_find_table", find_and_appear)
        assert store(aws).ensure_group("iced", TABLE) == target
    plain = {**table, "Parameters": {"classification": "parquet"}}
    glue.update_table(DatabaseName=database, TableInput={field: plain[field] for field in fields})
    with pytest.raises(StepError, match=rf"{database}\.{name} in AWS Glue, .* is no Iceberg table"):
        store(aws).ensure_group("iced", TABLE)
    # What lies elsewhere is not the group's, whatever its name.
    plain["StorageDescriptor"] = {**plain["StorageDescriptor"], "Location": "s3://others/place"}
    glue.update_table(DatabaseName=database, TableInput={field: plain[field] for field in fields})
    store(aws).delete_group("iced")
    assert aws.feature_tables("iced") == [name]


def test_what_glue_refuses_is_said(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    target = store(aws).ensure_group("iced", TABLE)
    aws.faults.throttle("glue:GetTable", count=2)
    assert store(aws).ensure_group("iced", TABLE) == target
    monkeypatch.setattr(storage.service_client, "__defaults__", (None, 32, 1))  # without the usual ten attempts
    aws.faults.throttle("glue:GetTable", count=10_000)
    message = "reading sagemaker_featurestore.iced_.* in AWS Glue, .*was refused: ThrottlingException"
    with pytest.raises(StepError, match=message):
        store(aws, retry_timeout_seconds=0.2).ensure_group("iced", TABLE)
