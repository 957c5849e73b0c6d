"""The Glue table that SageMaker makes for an offline store in Iceberg format: where it is, awaited, dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resources.aws.calls import error_code, error_message, is_missing
from resources.aws.waiting import wait_until
from step_scripts.runner.contract import StepError


@dataclass(frozen=True)
class CatalogTables:
    """Calls of Glue. `wait_seconds`: for a table to appear."""

    client: Any
    wait_seconds: float = 900.0
    poll_seconds: float = 2.0

    def ready(self, described: Mapping[str, Any]) -> str:
        """`database.table` of a feature group, once the table is there and names its Iceberg metadata.

        Raises `StepError` if the group has no such table, if it takes too long, and for what Glue refuses.
        """
        group, place = described["FeatureGroupName"], table_of(described)
        if place is None:
            raise StepError(
                f"feature group {group} names no table in AWS Glue, although its offline store is in Iceberg format: "
                "look at it in the SageMaker console, or delete the group and try again"
            )

        def appeared() -> bool:
            table = self._find(group, place)
            parameters = (table or {}).get("Parameters", {})
            if table is not None and parameters.get("table_type", "").upper() != "ICEBERG":
                raise StepError(
                    f"{place} in AWS Glue, the table of feature group {group}, is no Iceberg table. Drop it "
                    "and delete the group, or use another group name"
                )
            return bool(parameters.get("metadata_location"))

        try:
            wait_until(appeared, timeout=self.wait_seconds, interval=self.poll_seconds, what=f"the creation of {place}")
        except TimeoutError:
            raise StepError(
                f"feature group {group} is there, its Iceberg table {place} has not been in AWS Glue for "
                f"{self.wait_seconds:.0f} s. If somebody has dropped it, delete the group, which removes its "
                "records for good, or use another group name"
            ) from None
        return place

    def drop(self, described: Mapping[str, Any]) -> None:
        """Remove the table from Glue, where SageMaker leaves it, unless it is not there or not the group's."""
        from botocore.exceptions import ClientError

        group, place = described["FeatureGroupName"], table_of(described)
        table = self._find(group, place) if place else None
        if place is None or table is None:
            return
        root = described["OfflineStoreConfig"]["S3StorageConfig"]["S3Uri"].rstrip("/")
        if not table.get("StorageDescriptor", {}).get("Location", "").startswith(f"{root}/"):
            return
        database, name = place.split(".", 1)
        try:
            self.client.delete_table(DatabaseName=database, Name=name)
        except ClientError as error:
            if not is_missing(error):
                raise _refused("dropping", place, group, error) from error

    def _find(self, group: str, place: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        database, name = place.split(".", 1)
        try:
            return self.client.get_table(DatabaseName=database, Name=name)["Table"]
        except ClientError as error:
            if is_missing(error):
                return None
            raise _refused("reading", place, group, error) from error


def table_of(described: Mapping[str, Any]) -> str | None:
    """`database.table` of an offline store in Iceberg format, in lower case as Glue keeps them; None of another."""
    offline = described.get("OfflineStoreConfig", {})
    config = offline.get("DataCatalogConfig")
    if offline.get("TableFormat") != "Iceberg" or not config:
        return None
    return f"{config['Database']}.{config['TableName']}".lower()


def _refused(doing: str, place: str, group: str, error: Exception) -> StepError:
    return StepError(
        f"{doing} {place} in AWS Glue, the table of feature group {group}, was refused: "
        f"{error_code(error)}: {error_message(error)}"
    )
