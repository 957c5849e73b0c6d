"""The feature store resource: what assets see of the store."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from resources.feature_store.base import FeatureStore, OfflineSnapshot
from resources.feature_store.local import LocalFeatureStore
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.parameters import IngestFeaturesParams, IngestionTarget
from step_scripts.runner.contract import StepError
from tests import ROOT
from tests.feature_rows import NOON, TABLE, ingest_rows, record_id, row, write_rows


@pytest.fixture
def feature_store(tmp_path: Path) -> LocalFeatureStore:
    return LocalFeatureStore(root=str(tmp_path / "store"))


def test_the_target_is_what_the_step_takes(feature_store: FeatureStore, tmp_path: Path) -> None:
    target = feature_store.ensure_group("sales", TABLE)
    assert target == IngestionTarget(root=str(tmp_path / "store"), mirror=False)
    assert IngestFeaturesParams(table=TABLE, group="sales", target=target).target == target
    assert feature_store.ensure_group("sales", TABLE) == target
    assert [item.detail for item in feature_store.inventory()] == ["0 records, 0 MB"]
    with pytest.raises(StepError, match="is no name of a feature group"):
        feature_store.ensure_group("sales/2024", TABLE)


def test_snapshots_are_what_was_ingested(feature_store: FeatureStore, tmp_path: Path) -> None:
    store = OfflineStore(str(tmp_path / "store"))
    with pytest.raises(StepError, match="there is no feature group sales"):
        feature_store.offline("sales")
    feature_store.ensure_group("sales", TABLE)
    with pytest.raises(StepError, match="nothing has been ingested into feature group sales"):
        feature_store.offline("sales")
    ingest_rows(store, write_rows(tmp_path, [row(0), row(1)]))
    ingest_rows(store, write_rows(tmp_path, [row(1, 2.0, hours=1), row(2, hours=1)]))
    now = feature_store.offline("sales")
    assert (now.group, now.artifact.rows, now.deduplicate, now.commit, now.as_of) == ("sales", 3, True, 2, None)
    assert OfflineSnapshot.model_validate_json(now.model_dump_json()) == now
    # What a run has ingested, whatever others have added since.
    own = feature_store.offline("sales", commit=1)
    assert (own.artifact.rows, own.commit, len(own.artifact.files)) == (2, 1, 1)
    early = feature_store.offline("sales", NOON + timedelta(minutes=5))
    assert len(early.artifact.files) == 1
    assert early.as_of == NOON + timedelta(minutes=5)
    assert feature_store.get_record("sales", record_id(1)) == {
        "record_id": record_id(1), "event_time": NOON + timedelta(hours=1), "PRICE": 2.0, "ROOMS": 3, "SOLD": True
    }  # fmt: skip
    assert feature_store.get_record("sales", record_id(9)) is None
    feature_store.delete_group("sales")
    with pytest.raises(StepError, match="there is no feature group sales"):
        feature_store.get_record("sales", record_id(1))


def test_a_dataset_is_found_as_long_as_nothing_undid_it(feature_store: FeatureStore, tmp_path: Path) -> None:
    store = OfflineStore(str(tmp_path / "store"))
    first = write_rows(tmp_path, [row(0), row(1)])
    assert feature_store.find_ingestion("sales", first.digest) is None
    ingest_rows(store, first)
    found = feature_store.find_ingestion("sales", first.digest)
    assert found == feature_store.offline("sales")
    ingest_rows(store, write_rows(tmp_path, [row(2)]))
    # Something else came in: a mirror of the first dataset would have to delete it.
    assert feature_store.find_ingestion("sales", first.digest) is None
    ingest_rows(store, first, mirror=True)
    assert feature_store.find_ingestion("sales", first.digest) is not None
    store.delete_record("sales", record_id(0), NOON + timedelta(hours=1))
    assert feature_store.find_ingestion("sales", first.digest) is None
    ingest_rows(store, first, mirror=True)
    next(Path(store.folder("sales").data_uri).rglob("*.parquet")).unlink()
    assert feature_store.find_ingestion("sales", first.digest) is None


def test_the_modules_are_light() -> None:
    code = """
import sys, resources.feature_store.local, resources.feature_store.sagemaker
heavy = {"ray", "polars", "pyarrow", "numpy", "pandas", "pandera", "boto3", "botocore"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
