"""The feature store's table as engines of others read it."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
from pyiceberg.catalog import load_catalog
from pyiceberg.table import Table

# What AWS's guide gives for the latest state of each record.
STANDARD_QUERY = """
SELECT * EXCLUDE (row_num) FROM (
    SELECT *, row_number() OVER (
        PARTITION BY record_id ORDER BY event_time DESC, api_invocation_time DESC, write_time DESC
    ) AS row_num
    FROM events
) WHERE row_num = 1 AND NOT is_deleted
"""


def opened(root: Path | str, group: str = "sales") -> Table:
    """The table of a local group as anybody opens it."""
    folder = Path(root) / group
    catalog = load_catalog("housing", type="sql", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    return catalog.load_table(f"feature_store.{group}")


def latest_by_duckdb(events: pa.Table) -> pl.DataFrame:
    """The records of a table of events, by the standard query."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("events", events)
        found = pl.from_arrow(connection.sql(STANDARD_QUERY).to_arrow_table())
    assert isinstance(found, pl.DataFrame)
    return found.with_columns(pl.col(pl.Datetime).dt.convert_time_zone("UTC"))
