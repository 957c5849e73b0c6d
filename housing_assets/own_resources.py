"""Resources that no backend has another implementation of: where the source is, and the references between assets."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from dagster._core.storage.tags import (  # have no public names
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from pydantic import Field

from housing_assets.code_location import asset_keys
from housing_assets.config_fields import check_run_config
from resources.inventory import OwnedItem, files_item, remove_empty
from resources.references.io_manager import ReferenceIOManager, asset_folder, reference_files
from resources.sources.listing import absolute
from step_scripts.runner import storage
from step_scripts.runner.wording import megabytes

_SAMPLE = re.compile(r"house_sales_\d+\.csv")
_WILDCARD = re.compile(r"[*?\[]")


class SourceLocation(dg.ConfigurableResource):
    """Where the source files are when run configuration does not say, and where generated data goes."""

    landing: str | None = Field(default=None, description="Folder or s3:// prefix where new files arrive.")
    settle_seconds: float = Field(default=60.0, ge=0, description="A file is read once it is unchanged for so long.")
    timezone: str = Field(default="UTC", description="Time zone of the days of ingestion.")
    source: str | None = Field(default=None, description="Path, folder, glob or s3:// URI. Empty: generated data.")
    sample_folder: str = Field(description="Folder or s3:// prefix for generated data.")
    sample_rows: int = Field(default=10_000, ge=1, description="Rows to generate.")

    def resolve(self) -> str:
        """The source. Without one, data is generated once, the same on every machine."""
        if self.source:
            return self.source
        from housing_assets.sample_data import write_sample

        sample = storage.join(self.sample_folder, f"house_sales_{self.sample_rows}.csv")
        if not storage.exists(sample):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "sample.csv" if storage.is_remote(sample) else storage.local_path(sample)
                write_sample(file, rows=self.sample_rows)
                if storage.is_remote(sample):
                    storage.upload(file, sample)
        return sample

    def places_of_people(self) -> list[str]:
        """Places of people's own files: the landing place, and the configured source up to its first wildcard."""
        return [absolute(_WILDCARD.split(place)[0]) for place in (self.landing, self.source) if place]

    def place_within(self, location: str) -> str | None:
        """The place of people's own files that is at `location`, or lies in it."""
        own = absolute(location)
        return next((place for place in self.places_of_people() if (place + "/").startswith(own + "/")), None)

    def inventory(self) -> Sequence[OwnedItem]:
        """Files that the sample generator has written; not one that the configuration names as the source."""
        items = []
        for path, size, _ in storage.list_details(self.sample_folder):
            uri = storage.join(self.sample_folder, path)
            named = any((absolute(uri) + "/").startswith(place + "/") for place in self.places_of_people())
            if _SAMPLE.fullmatch(path) and not named:
                items.append(OwnedItem(kind="files", name=path, location=uri, detail=f"generated, {megabytes(size)}"))
        return items

    def remove(self, item: OwnedItem) -> None:
        """Remove a generated file; with it the folder, if that leaves it empty."""
        storage.delete_file(item.location)
        remove_empty(self.sample_folder)


class CheckedReferenceIOManager(ReferenceIOManager):
    """The IO manager, which every run initializes first: the moment to reject wrong run configuration."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Check the run's configuration. Raises `dagster.Failure`, also for days from a later to an earlier one."""
        if context.run is None:
            return
        check_run_config(dict(context.run.run_config))
        tags = context.run.tags
        first, last = tags.get(ASSET_PARTITION_RANGE_START_TAG), tags.get(ASSET_PARTITION_RANGE_END_TAG)
        if first and last and first > last:
            raise dg.Failure(
                f"the range of days {first}...{last} is reversed. Give the earlier day first: {last}...{first}",
                allow_retries=False,
            )

    def inventory(self) -> Sequence[OwnedItem]:
        """An item an asset: its reference files."""
        items: list[OwnedItem] = []
        for key, files in reference_files(self.root, asset_keys()).items():
            name = f"references of {key.to_user_string()}"
            items += files_item(asset_folder(self.root, key), name, [*files.values()])
        return items

    def remove(self, item: OwnedItem) -> None:
        """Remove the reference files of an asset."""
        key = dg.AssetKey(item.location.removeprefix(self.root.rstrip("/") + "/").split("/"))
        for uri in reference_files(self.root, [key])[key]:
            storage.delete_file(uri)
        remove_empty(item.location, self.root)
