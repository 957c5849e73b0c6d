"""What a person does in the Dagster UI, in a few verbs."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from playwright.sync_api import Page, TimeoutError, expect

from tests.platform_cli import Platform

LOCATION = "housing_assets.definitions"
_SECONDS = 300


@dataclass
class UserInterface:
    """Where the UI is, and the installation behind it."""

    url: str
    platform: Platform


class Browser:
    """A page of the UI."""

    def __init__(self, page: Page, ui: UserInterface, screenshots: Path) -> None:
        self.page = page
        self._ui = ui
        self._screenshots = screenshots
        self._greeted = False

    def open(self, path: str) -> None:
        """Go to a page of the UI, and close the dialog that greets at the first visit."""
        self.page.goto(self._ui.url + path)
        if not self._greeted:
            self._greeted = True
            with contextlib.suppress(TimeoutError):  # there is no dialog
                self.page.get_by_text("Skip", exact=True).first.click(timeout=20_000)

    def screenshot(self, name: str) -> None:
        """Keep what is shown."""
        self.page.wait_for_timeout(1500)  # for animations
        self.page.screenshot(path=self._screenshots / f"{name}.png")

    def sees(self, text: str | re.Pattern[str]) -> None:
        """Wait until a text is shown."""
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=120_000)

    def expand_groups(self, member: str) -> None:
        """Show the assets of all groups of the graph, `member` among them. The graph takes its time to listen."""

        def expanded() -> bool:
            if not self.page.get_by_text(member).first.is_visible():
                self.page.keyboard.press("Alt+e")
                self.page.wait_for_timeout(3000)
            return self.page.get_by_text(member).first.is_visible()

        self.until(expanded, 120)

    def click(self, name: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=name).first.click()

    def launch(self, job: str, config: dict[str, Any]) -> dg.DagsterRun:
        """Fill in a job's launchpad, press *Launch run*, and wait for the end of the run."""
        known = {run.run_id for run in self._ui.platform.runs()}
        text = yaml.safe_dump({"ops": {op: {"config": values} for op, values in config.items()}})
        query = urllib.parse.urlencode({"config": text})
        self.open(f"/locations/{LOCATION}/jobs/{job}/playground/setup?{query}")
        button = self.page.get_by_role("button", name="Launch Run", exact=False)
        expect(button.first).to_be_enabled(timeout=120_000)
        button.first.click()
        return self.finished(known)

    def finished(self, known: set[str]) -> dg.DagsterRun:
        """The end of the next run that is not among the known ones."""

        def look() -> dg.DagsterRun | None:
            new = [run for run in self._ui.platform.runs() if run.run_id not in known]
            return new[-1] if new and new[-1].is_finished else None

        return self.until(look)

    def until(self, look: Callable[[], Any], seconds: float = _SECONDS) -> Any:
        """Look again and again until there is something."""
        deadline = time.monotonic() + seconds
        while not (found := look()):
            if time.monotonic() > deadline:
                self.screenshot("timeout")
                raise AssertionError(f"not within {seconds} s: {self.page.url}")
            self.page.wait_for_timeout(500)
        return found
