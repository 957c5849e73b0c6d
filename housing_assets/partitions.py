"""The days of ingestion: partitions of `raw_csv` and `feature_group`, where there is a landing place."""

from __future__ import annotations

from datetime import date

import dagster as dg

from housing_assets.settings import Settings


def ingestion_days(first: date, timezone: str) -> dg.DailyPartitionsDefinition:
    """The days from `first` to today, in that time zone."""
    return dg.DailyPartitionsDefinition(str(first), timezone=timezone, end_offset=1)


_AUTOMATION = Settings.load()
# With a landing place, a day's files can be ingested again without the others; without one there is one source.
PARTITIONS = ingestion_days(_AUTOMATION.landing_start, _AUTOMATION.timezone) if _AUTOMATION.landing else None
BACKFILL = dg.BackfillPolicy.single_run() if PARTITIONS else None
