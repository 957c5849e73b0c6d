"""The Iceberg tables of offline stores, made and changed as SageMaker does it: through Glue and in S3.

Creation is the caller's, whose permissions have been checked; all later changes are made in the name of the feature
group's role. Of the table's own settings AWS documents little. Chosen here: format version 2, times with a time zone,
features in the case of their definitions.
"""

import threading
from contextlib import suppress
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.services import Services

EVENT_DAY = 10  # characters of an event time that are its date
_FIRST_FIELD = 1000  # Iceberg's number of the first field of a partition


class IcebergTables:
    """Creates, extends and fills the tables. `config`: the `DataCatalogConfig` of a feature group."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def create(
        self, config: Params, location: str, types: dict[str, str], event_time: str, region: str, role: str | None
    ) -> str | None:
        """Create the database, if it is not there, and the table. Returns why that failed."""
        from pyiceberg.exceptions import TableAlreadyExistsError

        try:
            create_table(self._catalog(region, role, creates=True), _identifier(config), types, event_time, location)
        except TableAlreadyExistsError:
            return f"The table {'.'.join(_identifier(config))} already exists in AWS Glue."
        except (ClientError, BotoCoreError, OSError) as error:
            return f"The Iceberg table could not be created: {error}"
        return None

    def add_columns(self, config: Params, additions: dict[str, str], region: str, role: str | None) -> str | None:
        """Add columns. Returns why that failed."""
        from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, ValidationError

        try:
            with self._catalog(region, role).load_table(_identifier(config)).update_schema() as update:
                for name, kind in additions.items():
                    update.add_column(name, _iceberg_type(kind))
        except (ClientError, OSError, CommitFailedException, NoSuchTableError, ValidationError, ValueError) as error:
            return f"The Iceberg table could not be changed: {error}"
        return None

    def append(self, config: Params, rows: Any, region: str, role: str | None) -> None:
        """Append an Arrow table whose columns are among the table's. Raises what S3 and Glue raise, and `OSError`."""
        from pyiceberg.exceptions import CommitFailedException, NoSuchTableError

        try:
            self._catalog(region, role).load_table(_identifier(config)).append(rows)
        except (CommitFailedException, NoSuchTableError) as error:
            raise OSError(str(error)) from error

    def _catalog(self, region: str, role: str | None, *, creates: bool = False) -> Any:
        # Most of the emulator starts without pyiceberg.
        from pyiceberg.catalog.glue import GlueCatalog

        endpoint, key = self._services.endpoint_url, self._services.platform_key(role)
        client = self._glue(region, self._services.platform_key(None) if creates else key)
        return GlueCatalog("glue", client, **{
            "s3.endpoint": endpoint, "s3.region": region, "s3.access-key-id": key, "s3.secret-access-key": "internal",
        })  # fmt: skip

    def _glue(self, region: str, key: str) -> Any:
        # Kept: Glue's service model is large, and takes long to read.
        with self._lock:
            if (region, key) not in self._clients:
                self._clients[region, key] = boto3.client(
                    "glue",
                    endpoint_url=self._services.endpoint_url,
                    region_name=region,
                    aws_access_key_id=key,
                    aws_secret_access_key="internal",
                )
            return self._clients[region, key]


def create_table(
    catalog: Any, identifier: tuple[str, str], types: dict[str, str], event_time: str, location: str
) -> None:
    """Make database and table for features of these types. Raises what Glue and S3 raise, and pyiceberg's errors."""
    from pyiceberg.exceptions import NamespaceAlreadyExistsError
    from pyiceberg.partitioning import PartitionField, PartitionSpec
    from pyiceberg.schema import Schema
    from pyiceberg.transforms import TruncateTransform
    from pyiceberg.types import BooleanType, NestedField, TimestamptzType

    columns = {name: _iceberg_type(kind) for name, kind in types.items()}
    columns |= {name: TimestamptzType() for name in ("write_time", "api_invocation_time")}
    columns["is_deleted"] = BooleanType()
    schema = Schema(*(NestedField(n, name, kind) for n, (name, kind) in enumerate(columns.items(), start=1)))
    field = schema.find_field(event_time).field_id
    day = PartitionField(field, _FIRST_FIELD, TruncateTransform(EVENT_DAY), f"{event_time}_trunc")
    with suppress(NamespaceAlreadyExistsError):
        catalog.create_namespace(identifier[0])
    catalog.create_table(
        identifier,
        schema,
        location=location,
        partition_spec=PartitionSpec(day),
        properties={"write.object-storage.enabled": "true"},
    )


def _identifier(config: Params) -> tuple[str, str]:
    return config["Database"].lower(), config["TableName"].lower()


def _iceberg_type(kind: str) -> Any:
    from pyiceberg.types import DoubleType, LongType, StringType

    return {"Integral": LongType(), "Fractional": DoubleType(), "String": StringType()}[kind]
