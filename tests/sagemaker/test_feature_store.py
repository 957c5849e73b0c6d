"""The SageMaker feature store: groups, ingestion with and without online store, faults in between."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from resources.aws.request_validation import InvalidJobRequest
from resources.feature_store.base import OfflineSnapshot
from resources.feature_store.feature_groups import table_of
from resources.feature_store.sagemaker import SageMakerFeatureStore
from step_scripts.feature_store import online_store
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.feature_store.online_client import (
    decoded_record,
    decoded_time,
    encoded_records,
    encoded_time,
)
from step_scripts.parameters import IngestionTarget, OnlineTarget
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError, StepRequest
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests.feature_rows import (
    NOON,
    TABLE,
    Ingested,
    Row,
    ingest_rows,
    record_id,
    records,
    row,
    rows_frame,
    scan,
    write_frame,
    write_rows,
)
from tests.other_engines import latest_by_duckdb
from tests.sagemaker.test_emulator_iceberg import catalog
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import ROLE, Aws
from tests.unit.housing_assets.checks.test_advisory import functions
from tests.waiting import until

ONLINE = OnlineTarget(group="sales", retry_timeout_seconds=120)


class Group:
    """A feature group `sales` of the fresh bucket, and rows that enter it in this process."""

    def __init__(self, aws: Aws, folder: Path, *, online: bool = False) -> None:
        self.aws, self.folder = aws, folder
        self.resource = SageMakerFeatureStore(
            root=aws.uri("features"), role_arn=ROLE, online_store=online, poll_seconds=0.05, wait_seconds=120
        )
        self.store = OfflineStore(self.resource.root)
        self.online = ONLINE if online else None

    def ingest(self, rows: Sequence[Row], **options: Any) -> Ingested:
        self.resource.ensure_group("sales", TABLE)
        options.setdefault("online", self.online)
        return ingest_rows(self.store, write_rows(self.folder, rows), **options)

    def assert_alike(self, numbers: Sequence[int]) -> None:
        """Both stores hold the same of these records, the online store their times to the millisecond."""
        for number in numbers:
            online = self.resource.get_record("sales", record_id(number))
            stored = self.store.get_record("sales", record_id(number))
            if stored is not None:
                moment = stored["event_time"]
                stored["event_time"] = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
            assert online == stored, number


@pytest.fixture
def offline(aws: Aws, aws_environment: SageMakerEmulator, tmp_path: Path) -> Group:
    return Group(aws, tmp_path)


@pytest.fixture
def group(aws: Aws, aws_environment: SageMakerEmulator, tmp_path: Path) -> Group:
    return Group(aws, tmp_path, online=True)


@pytest.fixture(autouse=True)
def _no_groups_left(aws: Aws) -> Any:
    """Feature groups belong to the account, not to the test's bucket."""
    yield
    aws.faults.clear()
    aws.remove_feature_groups("sales")


# --- groups --------------------------------------------------------------------------------------------------------


def test_a_group_is_created_once_and_tagged(offline: Group, aws: Aws) -> None:
    store = offline.resource
    targets: list[IngestionTarget] = []
    threads = [threading.Thread(target=lambda: targets.append(store.ensure_group("sales", TABLE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    described = aws.sagemaker.describe_feature_group(FeatureGroupName="sales")
    resolved = described["OfflineStoreConfig"]["S3StorageConfig"]["ResolvedOutputS3Uri"]
    assert len(targets) == 3
    assert all(t == targets[0] for t in targets)
    assert (offline.store.folder("sales").data_uri, targets[0].online) == (resolved, None)
    assert {d["FeatureName"]: d["FeatureType"] for d in described["FeatureDefinitions"]} == {
        "record_id": "String", "event_time": "String",
        "PRICE": "Fractional", "ROOMS": "Integral", "SOLD": "Integral",
    }  # fmt: skip
    tags = aws.sagemaker.list_tags(ResourceArn=described["FeatureGroupArn"])["Tags"]
    assert {"Key": "housing-assets:created-by", "Value": "housing-assets"} in tags
    assert store.ensure_group("sales", TABLE) == targets[0]


def test_files_are_readable_at_once_and_deleted_with_the_group(offline: Group, aws: Aws) -> None:
    aws.put("features/salesroom/data/part.parquet", "of another group")
    offline.ingest([row(0), row(1)])
    offline.ingest([row(1, 2.0, hours=1)])
    store = offline.resource
    now = store.offline("sales")
    assert (now.artifact.rows, now.deduplicate, now.commit) == (2, True, 2)
    assert OfflineSnapshot.model_validate_json(now.model_dump_json()) == now
    assert all(storage.exists(uri) and "/offline-store/sales-" in uri for uri in now.artifact.file_uris())
    early = store.offline("sales", NOON + timedelta(minutes=1))
    assert len(early.artifact.files) == 1
    assert records(scan(offline.store, as_of=NOON))[record_id(1)][1] == 1.0
    found = store.get_record("sales", record_id(1))
    assert found is not None
    assert found["PRICE"] == 2.0
    assert "2 records" in next(item.detail for item in store.inventory())
    store.delete_group("sales")
    assert aws.keys() == ["features/salesroom/data/part.parquet"]
    assert not aws.feature_groups("sales")
    store.delete_group("sales")
    with pytest.raises(StepError, match="there is no feature group sales"):
        store.offline("sales")


def test_athenas_standard_query_on_the_glue_table_gives_the_records(offline: Group, aws: Aws) -> None:
    offline.ingest([row(n, hours=n) for n in range(30)])
    offline.ingest([row(n, 2.0, hours=n + 1, rooms=None) for n in range(5, 20)], mirror=True)
    offline.store.delete_record("sales", record_id(7), NOON + timedelta(days=9))
    table = catalog(aws).load_table(table_of(aws.sagemaker.describe_feature_group(FeatureGroupName="sales")) or "")
    found = latest_by_duckdb(table.scan().to_arrow()).select(
        "record_id",
        pl.col("event_time").str.to_datetime(time_unit="us", time_zone="UTC"),
        "PRICE",
        "ROOMS",
        pl.col("SOLD").cast(pl.Boolean),
    )
    assert found.height == 14
    assert records(found.lazy()) == records(scan(offline.store))


def _with(*columns: ColumnSpec) -> TableSpec:
    return TABLE.model_copy(update={"columns": columns})


def test_a_new_column_that_may_be_empty_is_added_to_the_group(offline: Group, aws: Aws) -> None:
    offline.ingest([row(0)])
    wider = _with(*TABLE.columns, ColumnSpec(name="GARDEN", dtype="float64", nullable=True))
    threads = [threading.Thread(target=offline.resource.ensure_group, args=("sales", wider)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    described = aws.sagemaker.describe_feature_group(FeatureGroupName="sales")
    assert described["FeatureDefinitions"][-1] == {"FeatureName": "GARDEN", "FeatureType": "Fractional"}
    frame = rows_frame([(*row(1), 2.5)], wider)  # pyright: ignore[reportArgumentType]
    ingest_rows(offline.store, write_frame(offline.folder, frame), table=wider)
    assert records(scan(offline.store))[record_id(0)][-1] is None
    with pytest.raises(StepError, match="GARDEN is missing"):
        offline.resource.ensure_group("sales", TABLE)


def test_other_schemas_are_refused_with_column_and_types(offline: Group) -> None:
    offline.resource.ensure_group("sales", TABLE)
    other = _with(TABLE.columns[0], ColumnSpec(name="ROOMS", dtype="string", nullable=True), TABLE.columns[2])
    other = other.model_copy(update={"key_columns": ("ROOMS",)})
    message = r"ROOMS is String \(string\) in the table and Integral in the feature group.*Use another group name"
    with pytest.raises(StepError, match=message):
        offline.resource.ensure_group("sales", other)
    with pytest.raises(StepError, match=r"SOLD \(Integral\) is missing in the table"):
        offline.resource.ensure_group("sales", _with(*TABLE.columns[:2]))
    with pytest.raises(StepError, match="FeatureName is 'A B', which does not match"):
        offline.resource.ensure_group("rooms", _with(*TABLE.columns, ColumnSpec(name="A B", dtype="int64")))
    both = SageMakerFeatureStore(root=offline.resource.root, role_arn=ROLE, online_store=True)
    with pytest.raises(StepError, match="has no online store, the configuration says online_store = True"):
        both.ensure_group("sales", TABLE)


def test_a_group_of_others_is_left_alone(offline: Group, aws: Aws) -> None:
    elsewhere = SageMakerFeatureStore(root=aws.uri("others"), role_arn=ROLE, poll_seconds=0.05)
    elsewhere.ensure_group("sales", TABLE)
    for use in (offline.resource.delete_group, lambda name: offline.resource.ensure_group(name, TABLE)):
        with pytest.raises(StepError, match=r"not this project's\. Use another group name"):
            use("sales")
    assert aws.sagemaker.describe_feature_group(FeatureGroupName="sales")["FeatureGroupStatus"] == "Created"


def test_a_failed_creation_says_why_and_can_be_repeated(offline: Group, aws: Aws) -> None:
    aws.faults.fail_feature_group()
    with pytest.raises(StepError, match="feature group sales is CreateFailed: The execution role cannot write"):
        offline.resource.ensure_group("sales", TABLE)
    offline.resource.delete_group("sales")
    aws.faults.throttle("*FeatureGroup", count=3)
    assert offline.resource.ensure_group("sales", TABLE).root == offline.resource.root
    # Deleted behind our back, and there are records.
    offline.ingest([row(0)])
    aws.sagemaker.delete_feature_group(FeatureGroupName="sales")
    until(lambda: not aws.feature_groups("sales"))
    with pytest.raises(StepError, match="taken more than 0 s to be ready"):
        SageMakerFeatureStore(root=offline.resource.root, role_arn=ROLE, wait_seconds=0.001).ensure_group(
            "sales", TABLE
        )


def test_bad_configuration_is_found_before_anything_is_made(aws: Aws) -> None:
    with pytest.raises(ValidationError, match="must be an s3:// prefix"):
        SageMakerFeatureStore(root="/tmp/features", role_arn=ROLE)
    store = SageMakerFeatureStore(root=aws.uri("features"), role_arn="no role", offline_kms_key_id="no key")
    with pytest.raises(InvalidJobRequest, match=r"(?s)RoleArn, value: 7, valid min length: 20.*KmsKeyId is 'no key'"):
        store.setup_for_execution(dg.build_init_resource_context())


# --- online store --------------------------------------------------------------------------------------------------


def test_the_online_store_follows_every_change(group: Group, aws: Aws) -> None:
    first = group.ingest([row(n) for n in range(130)])
    assert (first.added, first.written_online, first.rows_readable) == (130, 130, 130)
    group.assert_alike([0, 64, 129])
    # A later state, an older one, and another one of the same time, which the service itself would ignore.
    second = group.ingest([row(0, 2.0, hours=1), row(1, 3.0, hours=-1), row(2, 4.0, rooms=None)])
    assert (second.superseded, second.outdated, second.written_online) == (2, 1, 2)
    group.assert_alike([0, 1, 2])
    mirrored = group.ingest([row(n) for n in range(3)], mirror=True)
    assert (mirrored.deleted, mirrored.written_online) == (127, 129)
    group.assert_alike([0, 1, 2, 3, 129])
    assert group.resource.get_record("sales", record_id(3)) is None
    back = group.ingest([row(n, hours=9) for n in range(130)], mirror=True)
    assert back.rows_readable == 130
    group.assert_alike([0, 1, 2, 3, 64, 129])
    again = group.ingest([row(n, hours=9) for n in range(130)], mirror=True)
    assert (again.already_ingested, again.written_online) == (True, 0)


def test_what_goes_online_is_not_written_offline_again(group: Group, aws: Aws) -> None:
    group.ingest([row(n) for n in range(30)])
    runtime = aws.client("sagemaker-featurestore-runtime")
    marker = [
        {"FeatureName": "record_id", "ValueAsString": "marker"},
        {"FeatureName": "event_time", "ValueAsString": "1970-01-01T00:00:01Z"},
    ]
    runtime.put_record(FeatureGroupName="sales", Record=marker, TargetStores=["OfflineStore"])

    def foreign() -> set[str]:
        ours = {f.path for f in group.store.state("sales").files}
        data = group.store.folder("sales").data_uri
        return {uri for uri in storage.list_files(data) if uri.removeprefix(data + "/") not in ours}

    # The service writes all that it was given together, so what came before the marker would be there with it.
    until(foreign)
    (uri,) = foreign()
    with storage.open_input(uri) as file:
        assert pq.read_table(file).column("record_id").to_pylist() == ["marker"]
    assert set(records(scan(group.store))) == {record_id(n) for n in range(30)}


def test_throttling_and_unprocessed_entries_lose_nothing(group: Group, aws: Aws) -> None:
    group.resource.ensure_group("sales", TABLE)
    aws.faults.unprocessed_records(90)
    aws.faults.throttle("BatchWriteRecord", count=5)
    aws.faults.throttle("BatchGetRecord", count=2)
    assert group.ingest([row(n) for n in range(120)]).written_online == 120
    assert not aws.faults.active()
    group.assert_alike([0, 60, 119])
    aws.faults.throttle("DeleteRecord", count=3)
    assert group.ingest([row(0)], mirror=True).deleted == 119
    group.assert_alike([0, 60, 119])


def test_an_ingestion_that_fails_online_commits_nothing_and_a_repeat_heals_it(group: Group, aws: Aws) -> None:
    group.ingest([row(n) for n in range(3)])
    aws.faults.unprocessed_records(10_000)
    with pytest.raises(StepError, match=r"accepted no request for 1 s \(40 entries not processed\)|25 entries"):
        group.ingest(
            [row(n, 2.0, hours=1) for n in range(50)], online=OnlineTarget(group="sales", retry_timeout_seconds=1)
        )
    aws.faults.clear()
    assert len(group.store.commits("sales")) == 1
    assert {v[1] for v in records(scan(group.store)).values()} == {1.0}
    assert len([k for k in aws.keys("features/sales/") if "/data/" in k]) == 1, "its files are removed"
    healed = group.ingest([row(n, 2.0, hours=1) for n in range(50)])
    assert (healed.superseded, healed.added, healed.written_online) == (3, 47, 50)
    group.assert_alike([0, 3, 49])


def test_an_outage_of_the_online_store_says_what_is_where(
    group: Group, aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.ingest([row(n) for n in range(3)])
    synchronize, calls = online_store._Synchronizer.synchronize, itertools.count()

    def synchronize_then_break(self: Any, records: Any) -> int:
        if next(calls) == 1:
            aws.faults.unprocessed_records(10_000)
        return synchronize(self, records)

    monkeypatch.setattr(online_store._Synchronizer, "synchronize", synchronize_then_break)
    rows = [row(n, 2.0, hours=1) for n in range(250)]
    target = OnlineTarget(group="sales", in_flight=1, retry_timeout_seconds=1)
    with pytest.raises(StepError) as failure:
        group.ingest(rows, online=target)
    aws.faults.clear()
    listed = failure.value.keep["missing_record_ids.csv"]
    header, *missing = Path(listed).read_text().splitlines()
    assert header == "record_id"
    assert len(missing) == len(set(missing)) == 150
    text = str(failure.value)
    assert "accepted no request for 1 s (25 entries not processed)" in text
    assert "Online: 100 of 250 records as this ingestion has them, 150 not: " in text
    assert f"150 not: {', '.join(sorted(missing)[:10])} and others. missing_record_ids.csv lists them all" in text
    assert "Offline: none of them; the offline store is as before: its latest commit is still 1" in text
    assert (failure.value.details["records_online"], failure.value.details["records_missing_online"]) == (100, 150)
    for number in range(250):
        found = group.resource.get_record("sales", record_id(number))
        assert (found is not None and found["PRICE"] == 2.0) == (record_id(number) not in missing), number
    assert group.ingest(rows).written_online == 250
    group.assert_alike([0, 99, 100, 249])


@pytest.mark.parametrize("note", ["two\nlines", "x" * 180_000], ids=["in the whole request", "as a single entry"])
def test_a_record_that_the_online_store_refuses_is_named(group: Group, note: str) -> None:
    notes = (ColumnSpec(name=name, dtype="string", nullable=True) for name in ("NOTE", "MORE"))
    table = _with(*TABLE.columns, *notes).model_copy(update={"key_columns": ("NOTE", "MORE")})
    group.resource.ensure_group("sales", table)
    rows = [(*row(0), "short", None), (*row(1), note, note), (*row(2), None, None)]
    frame = rows_frame(rows, table)  # pyright: ignore[reportArgumentType]
    with pytest.raises(StepError, match=f"record {record_id(1)}: the online store.*refuses"):
        ingest_rows(group.store, write_frame(group.folder, frame), table=table, online=ONLINE)
    assert group.store.commits("sales") == []


def test_values_survive_the_way_through_text() -> None:
    table = _with(*TABLE.columns, ColumnSpec(name="AT", dtype="datetime", nullable=True))
    rows = [
        (*row(0, 0.1 + 0.2, hours=1 / 3600e6), NOON + timedelta(microseconds=1)),
        (*row(1, -1e-300, hours=-24 * 365 * 80, rooms=-(2**62), sold=False), None),
    ]
    frame = rows_frame(rows, table)  # pyright: ignore[reportArgumentType]
    kept = frame.with_columns(pl.col("event_time").dt.truncate("1ms"))
    assert [decoded_record(text, table) for text in encoded_records(frame, table)] == kept.to_dicts()
    for moment in (0, 1, -1, 999, 1000, 1_700_000_000_123_456, -2_500_000_000_000_001, -40_000_000_000_000_000):
        text = encoded_time(moment)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text), "the form that the service takes"
        assert 0 <= moment - decoded_time(text) < 1000
        assert decoded_time(text) == moment // 1000 * 1000


def test_the_later_of_two_events_in_one_millisecond_is_online(group: Group) -> None:
    group.ingest([row(0), row(1)])
    later = group.ingest([row(0, 2.0, hours=1 / 3600e6), row(1)])
    assert (later.superseded, later.written_online) == (1, 1)
    found, stored = (store.get_record("sales", record_id(0)) for store in (group.resource, group.store))
    assert found is not None
    assert stored is not None
    assert (found["PRICE"], stored["PRICE"]) == (2.0, 2.0)
    assert stored["event_time"] - found["event_time"] == timedelta(microseconds=1)
    assert group.ingest([row(1)], mirror=True).deleted == 1
    assert group.resource.get_record("sales", record_id(0)) is None


def test_a_check_shows_whether_online_equals_offline(group: Group, offline: Group, aws: Aws) -> None:
    def judged(store: SageMakerFeatureStore) -> tuple[bool, str, list[str]]:
        check = functions()[dg.AssetCheckKey(dg.AssetKey("feature_group"), "online_equals_offline")]
        result = check(store.offline("sales"), store)
        named = result.metadata.get("differing_ids") if result.metadata else None
        return result.passed, result.description, named.value if named else []

    group.ingest([row(n, hours=24 * (n % 3)) for n in range(30)])
    group.ingest([row(n, hours=24 * (n % 3)) for n in range(28)] + [row(30, hours=200)], mirror=True)
    assert judged(group.resource) == (True, "0 of 31 records differ", [])
    assert judged(offline.resource) == (True, "the feature group has no online store", [])
    runtime = aws.client("sagemaker-featurestore-runtime")
    runtime.delete_record(
        FeatureGroupName="sales", RecordIdentifierValueAsString=record_id(0), EventTime="2024-06-01T00:00:00.000Z",
        TargetStores=["OnlineStore"],
    )  # fmt: skip
    (other,) = encoded_records(rows_frame([row(28, hours=2000)]), TABLE)  # deleted offline
    record = [{"FeatureName": name, "ValueAsString": text} for name, text in other.items()]
    runtime.put_record(FeatureGroupName="sales", Record=record, TargetStores=["OnlineStore"])
    differing = sorted([record_id(0), record_id(28)])
    passed, description, named = judged(group.resource)
    assert (passed, named) == (False, differing)
    assert description.startswith("2 of 31 records differ: somebody else writes to the online store")
    group.ingest([row(n, 2.0, hours=3000) for n in (0, 28)])
    assert judged(group.resource) == (True, "0 of 31 records differ", [])


# --- the step ------------------------------------------------------------------------------------------------------

STEPS = """
import json, sys
from step_scripts.runner.contract import StepRequest
from step_scripts.runner.ray_session import RaySession, RaySettings
from step_scripts.runner.execution import PrintReporter, run_step

session = RaySession(RaySettings(num_cpus=2, object_store_memory=256 << 20))
try:
    ingest = StepRequest.model_validate_json(sys.argv[1])
    ingested = run_step(ingest, PrintReporter(), session)
    split = StepRequest.model_validate_json(sys.argv[2])
    split = split.model_copy(update={"inputs": {"features": ingested.outputs["features"]}})
    print(json.dumps([r.model_dump(mode="json") for r in (ingested, run_step(split, PrintReporter(), session))]))
finally:
    session.stop()
"""


@pytest.mark.slow
def test_the_steps_work_on_s3_with_ray(group: Group, aws: Aws) -> None:
    rows = [row(n, float(n), hours=n % 3) for n in range(300)]
    local = write_rows(group.folder, rows, parts=3)
    for file in local.files:
        aws.put(f"rows/{file.path}", Path(local.file_uri(file.path)).read_bytes())
    target = group.resource.ensure_group("sales", TABLE)
    common: dict[str, Any] = {"output_root": aws.uri("out"), "code_version": "1"}
    table = TABLE.model_dump(mode="json")
    requests = [
        StepRequest(
            step="ingest_features",
            params={"table": table, "group": "sales", "target": target.model_dump()},
            inputs={"rows": local.model_copy(update={"uri": aws.uri("rows")})},
            **common,
        ),
        StepRequest(step="prepare_splits", params={"table": table, "deduplicate": False}, **common),
    ]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *(r.model_dump_json() for r in requests)],
        cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.PIPE, text=True,
        check=True, timeout=300,
    )  # fmt: skip
    ingested, split = json.loads(done.stdout.splitlines()[-1])
    assert ingested["metrics"] == {
        "rows_in": 300, "rows_readable": 300, "added": 300, "unchanged": 0, "superseded": 0, "deleted": 0,
        "written_online": 300,
    }  # fmt: skip
    assert group.resource.find_ingestion("sales", local.digest) == group.resource.offline("sales")
    assert sum(split["outputs"][name]["rows"] for name in ("train", "validation", "test")) == 300
    group.assert_alike(range(0, 300, 50))
    assert not [key for key in aws.keys("out") if "/scratch/" in key]
