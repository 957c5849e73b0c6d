"""The days that have files in the landing place: `python -m housing_assets.automation.days`, the range of `make
run`."""

import sys
import time

from housing_assets.assets.landing import files_by_day
from housing_assets.settings import Settings
from resources.sources.listing import Listing, list_landing


def range_with_files() -> str:
    """`<first day>...<last day>` of the files. Raises `LookupError` if there is none of a day that can be ingested."""
    settings = Settings.load()
    landing = settings.landing
    if landing is None:
        raise LookupError("HOUSING_LANDING is not set: there are no days, and no range of them is needed")
    listing = list_landing(landing) or Listing()
    by_day, _ = files_by_day(listing, landing, settings.timezone, settings.landing_start, time.time())
    if not (days := [*by_day]):
        raise LookupError(
            f"{landing} has no CSV file of a day from HOUSING_LANDING_START={settings.landing_start} to "
            "today. Put files there, move the start, or unset HOUSING_LANDING to use one source (HOUSING_RAW_CSV)"
        )
    return f"{days[0]}...{days[-1]}"


if __name__ == "__main__":
    try:
        sys.stdout.write(range_with_files() + "\n")
    except LookupError as error:
        sys.exit(str(error))
