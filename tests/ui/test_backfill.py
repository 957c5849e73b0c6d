"""Many days of ingestion from the UI, by clicking: one backfill, one run. Screenshots: `tests/ui/screenshots`."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from playwright.sync_api import expect

from housing_assets.sample_data import write_sample
from tests.platform_cli import Platform
from tests.ui.browser import LOCATION, Browser, UserInterface

pytestmark = pytest.mark.slow
ROWS = 300
# The week before last, with files for three days in a row.
TODAY = datetime.now(UTC).date()
START, DAYS = TODAY - timedelta(14), [str(TODAY - timedelta(days)) for days in (11, 10, 9)]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """An installation with a landing place."""
    folder = tmp_path_factory.mktemp("backfill")
    for number, day in enumerate(DAYS):
        file = write_sample(folder / "landing" / day / "sales.csv", rows=ROWS, seed=number, invalid_fraction=0)
        os.utime(file, (1.7e9, 1.7e9))
    return Platform(folder, {"HOUSING_LANDING": str(folder / "landing"), "HOUSING_LANDING_START": str(START)})


def test_a_range_of_days_is_one_run(ui: UserInterface, browser: Browser) -> None:
    browser.open(f"/locations/{LOCATION}/asset-groups/ingestion/list")
    for asset in ("raw_csv", "feature_group"):
        browser.sees(asset)
    # The first box of the table selects all rows. What is drawn over it takes the click.
    everything = browser.page.locator("label", has=browser.page.locator("input[type=checkbox]")).first
    everything.click()
    browser.page.get_by_role("button", name="Materialize selected (2)").click()
    browser.sees("Launch runs to materialize 2 assets")
    browser.page.get_by_role("button", name="Custom", exact=True).click()
    days = browser.page.locator("input[type=text]").last
    days.fill(f"[{DAYS[0]}...{DAYS[-1]}]")
    days.press("Enter")
    browser.sees("3 partitions")
    browser.screenshot("backfill_range")
    launch = browser.page.get_by_role("button", name="Launch backfill")
    expect(launch).to_be_enabled(timeout=120_000)
    launch.click()

    run = browser.finished(set())
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert {key.to_user_string() for key in run.asset_selection or ()} == {"raw_csv", "feature_group"}
    with ui.platform.instance() as instance:

        def completed() -> list[dg.DagsterRun] | None:
            [backfill] = instance.get_backfills()
            assert backfill.status.value not in ("FAILED", "COMPLETED_FAILED", "CANCELED"), backfill.error
            own = dg.RunsFilter(tags={"dagster/backfill": backfill.backfill_id})
            return list(instance.get_runs(own)) if backfill.status.value == "COMPLETED_SUCCESS" else None

        assert [each.run_id for each in browser.until(completed)] == [run.run_id]
        assert len(ui.platform.runs()) == 1
        for asset in ("raw_csv", "feature_group"):
            assert instance.get_materialized_partitions(dg.AssetKey(asset)) == set(DAYS)
        # What `keep_up_to_date` waits for: every day has passed its checks, not only the run as a whole.
        for asset, check in (("raw_csv", "schema"), ("feature_group", "reconciliation")):
            key = dg.AssetCheckKey(dg.AssetKey(asset), check)
            found = instance.event_log_storage.get_asset_check_execution_history(key, limit=20)
            assert {r.partition for r in found if r.status.value == "SUCCEEDED"} >= set(DAYS)
    group = ui.platform.metadata("feature_group")
    assert (group["rows_in"], group["rows_live"]) == (3 * ROWS, 3 * ROWS)

    browser.open(f"/runs/b/{run.tags['dagster/backfill']}")
    browser.sees(re.compile("Completed|Succeeded|Success"))
    browser.screenshot("backfill")
    browser.open("/assets/feature_group?view=partitions")
    browser.sees(DAYS[0])
    browser.screenshot("partitions")


def test_a_range_of_some_days_leaves_the_records_of_the_others(platform: Platform) -> None:
    """A range of days is not the whole source: what it lacks has not been removed."""
    command = ["-m", "dagster", "asset", "materialize", "-m", "housing_assets.definitions"]
    command += ["--select", 'key:"raw_csv" or key:"feature_group"']
    done = platform.run(*command, "--partition-range", f"{DAYS[1]}...{DAYS[2]}")
    assert done.returncode == 0, done.stdout
    group = platform.metadata("feature_group")
    assert (group["rows_in"], group["added"], group["rows_live"]) == (2 * ROWS, 0, 3 * ROWS)
