"""The tests of storage that take a root, on S3; references between assets there; generated data there."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from housing_assets.assets.landing import LandingCursor, day_of, files_by_day, files_of_days
from housing_assets.deployments import SourceLocation
from resources.references.io_manager import ReferenceIOManager
from resources.references.types import SplitRef
from resources.sources.listing import list_landing, list_source
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact
from step_scripts.runner.storage import file_state
from tests.unit.step_scripts.runner.test_storage import (
    test_a_failed_write_keeps_the_old_content as test_a_failed_write_keeps_the_old_content,
)
from tests.unit.step_scripts.runner.test_storage import (
    test_listing_deleting_and_existence as test_listing_deleting_and_existence,
)
from tests.unit.step_scripts.runner.test_storage import test_missing_files as test_missing_files
from tests.unit.step_scripts.runner.test_storage import test_reading_parts_of_a_file as test_reading_parts_of_a_file
from tests.unit.step_scripts.runner.test_storage import (
    test_write_replaces_and_leaves_nothing_else as test_write_replaces_and_leaves_nothing_else,
)

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws


@pytest.fixture
def root(aws: "Aws", aws_environment: Any) -> str:
    return aws.uri("root")


def test_an_upload_in_pieces(root: str, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * (1 << 16) + b"end")
    storage.upload(file, storage.join(root, "large"))
    assert storage.read_bytes(storage.join(root, "large")) == file.read_bytes()


def test_references_go_from_asset_to_asset_through_s3(root: str) -> None:
    artifact = Artifact.of("s3://b/k", [], digest="0")
    value = SplitRef(rows=artifact, fraction=0.5, configured_fraction=0.5)

    @dg.asset
    def split() -> SplitRef:
        return value

    @dg.asset
    def reader(split: SplitRef) -> None:
        assert split == value

    assert dg.materialize([split, reader], resources={"io_manager": ReferenceIOManager(root=root)}).success
    [file] = storage.list_files(root)
    assert file.startswith(storage.join(root, "split") + "/")


def test_landed_files_are_found_by_day_on_s3(root: str) -> None:
    for name in ("2026-11-20/a.csv", "2026-11-20/b.csv", "2026-11-21/c.csv", "2026-11-20/notes.txt"):
        storage.write_bytes(storage.join(root, name), b"x\n")
    listing = list_landing(root)
    assert listing is not None
    files = listing.files
    assert [str(day_of(file, root, "UTC")) for file in files] == ["2026-11-20", "2026-11-20", "2026-11-21"]
    assert listing.others == ["2026-11-20/notes.txt"]
    later = max(file.modified for file in files) + 100
    ready, waiting = files_of_days(listing, root, "UTC", [date(2026, 11, 20)], later, 60.0)
    assert ([file.uri for file in ready], waiting) == ([file.uri for file in files[:2]], 0)
    by_day, _ = files_by_day(listing, root, "UTC", date(2026, 11, 1), later)
    _, _, cursor = LandingCursor().look(by_day, later, 60.0)
    batches, _, _ = cursor.look(by_day, later, 60.0)
    assert [file for batch in batches.values() for file in batch] == list(files)


def test_what_is_written_over_is_another_file_although_size_and_time_are_the_same(root: str) -> None:
    uri, below = storage.join(root, "sales.csv"), storage.join(root, "*.csv")
    storage.write_bytes(uri, b"PRICE\n1\n")
    [before] = list_source(uri).files
    assert list_source(below).files == [before]
    storage.write_bytes(uri, b"PRICE\n2\n")
    [after] = list_source(uri).files
    assert (before.bytes, before.change != after.change) == (after.bytes, True)
    assert file_state(uri).change == after.change
    with pytest.raises(FileNotFoundError):
        file_state(storage.join(root, "nothing.csv"))


def test_generated_data_and_source_files_are_found_on_s3(root: str) -> None:
    location = SourceLocation(sample_folder=root, sample_rows=50)
    uri = location.resolve()
    assert uri == storage.join(root, "house_sales_50.csv")
    [found] = list_source(uri).files
    assert found.bytes == len(storage.read_bytes(uri))
    assert list_source(storage.join(root, "*.csv")).files == [found]
    assert list_source(root).files == [found]
    storage.write_bytes(uri, b"kept")
    assert location.resolve() == uri
    assert storage.read_bytes(uri) == b"kept"
