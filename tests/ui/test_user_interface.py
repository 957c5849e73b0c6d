"""The platform in the Dagster UI, by clicking: materialize, a gate that blocks, approval that deploys.

The tests follow each other on one installation, as somebody's first day does. Screenshots: `tests/ui/screenshots`.
"""

from __future__ import annotations

import re

import dagster as dg
import pytest

from tests.platform_cli import SMALL_SEARCH
from tests.ui.browser import LOCATION, Browser, UserInterface

pytestmark = pytest.mark.slow
SUCCESS, FAILURE = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE
GENEROUS = {"evaluation_report": {"rmse_threshold": 1e6}}


def test_everything_is_materialized_by_a_click(ui: UserInterface, browser: Browser) -> None:
    browser.open("/asset-groups")
    browser.sees("ingestion")
    browser.screenshot("before")
    assert not browser.page.get_by_text(re.compile("Join the.*community", re.IGNORECASE)).is_visible()
    known = {run.run_id for run in ui.platform.runs()}
    browser.click("Materialize all")
    assert browser.finished(known).status == SUCCESS
    browser.open("/asset-groups")
    browser.expand_groups("registered_model")
    browser.screenshot("graph")
    for asset in ("raw_csv", "feature_group", "tuned_model", "evaluation_report", "endpoint"):
        browser.open(f"/assets/{asset}")
        browser.sees("Latest materialization")
        browser.screenshot(asset)
    browser.open("/assets/evaluation_report?view=checks")
    browser.sees("rmse_threshold")
    browser.screenshot("checks")


def test_the_terminal_shows_no_warning_of_dagster(ui: UserInterface) -> None:
    """Of the file with Dagster's settings in the folder where it was started, and of what Dagster will replace."""
    printed = (ui.platform.folder / "ui.log").read_text()
    assert "Serving dagster-webserver" in printed
    assert [line for line in printed.splitlines() if "dagster.yaml" in line or "Supersession" in line] == []


PLOTS = {
    "tuned_model": ("learning_curve", "importance", "search"),
    "evaluation_report": ("predicted_against_actual", "residuals"),
}


@pytest.mark.parametrize(("asset", "plot"), [(asset, plot) for asset, plots in PLOTS.items() for plot in plots])
def test_a_plot_is_a_picture(browser: Browser, asset: str, plot: str) -> None:
    picture = browser.picture(asset, plot)
    browser.screenshot(f"{asset}_{plot}")
    assert picture.width == 640
    colours = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert colours is not None
    assert len(colours) > 10, "a plot of axes, text and data"
    assert max(count for count, _ in colours) < 0.99 * picture.width * picture.height, "of one colour"


def test_jobs_schedules_and_sensors_explain_themselves(browser: Browser) -> None:
    browser.open("/automation")
    for name in ("landing_files", "approved_models", "failed_runs", "keep_up_to_date", "weekly_retraining"):
        browser.sees(name)
    browser.screenshot("automation")
    browser.open(f"/locations/{LOCATION}/jobs/approve_model/playground")
    browser.sees("Scaffold missing config")
    browser.screenshot("launchpad")


def test_a_failing_gate_blocks(ui: UserInterface, browser: Browser) -> None:
    registered = ui.platform.materializations("registered_model")
    run = browser.launch("retrain", {**SMALL_SEARCH, "evaluation_report": {"rmse_threshold": 1.0}})
    assert run.status == FAILURE
    assert ui.platform.materializations("registered_model") == registered
    browser.open("/assets/evaluation_report?view=checks&checkDetail=rmse_threshold")
    browser.sees("rmse_threshold")
    browser.sees("Failed")
    browser.screenshot("gate")


def test_an_approved_model_is_deployed(ui: UserInterface, browser: Browser) -> None:
    serving = ui.platform.reference("endpoint")["model_digest"]
    manual = {"registered_model": {"approval": "manual"}}
    run = browser.launch("retrain", {"tuned_model": {**SMALL_SEARCH["tuned_model"], "seed": 7}, **GENEROUS, **manual})
    assert run.status == SUCCESS
    version = ui.platform.reference("registered_model")
    assert version["status"] == "PendingManualApproval"
    browser.open("/assets/registered_model")
    browser.sees("PendingManualApproval")
    browser.screenshot("pending")

    decision = {"version": version["version"], "who": "ann", "why": "better on every slice"}
    assert browser.launch("approve_model", {"approve": decision}).status == SUCCESS
    browser.open(f"/locations/{LOCATION}/sensors/approved_models")
    # The switch itself is drawn over a checkbox that lies outside of the page.
    browser.page.locator("label", has=browser.page.locator("input[type=checkbox]")).first.click()

    def watched() -> bool:
        with ui.platform.instance() as instance:
            return any(s.is_running and s.instigator_name == "approved_models" for s in instance.all_instigator_state())

    browser.until(watched)
    browser.rest()

    def deployed() -> bool:
        return ui.platform.reference("endpoint")["model_digest"] == version["artifact"]["digest"]

    assert serving != version["artifact"]["digest"]
    browser.until(deployed)
    browser.open("/assets/endpoint")
    browser.sees(f"housing/{version['version']}")
    browser.screenshot("deployed")
