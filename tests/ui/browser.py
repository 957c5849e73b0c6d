"""What a person does in the Dagster UI, in a few verbs."""

from __future__ import annotations

import base64
import io
import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from PIL import Image
from playwright.sync_api import Page, expect

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

    def open(self, path: str) -> None:
        """Go to a page of the UI."""
        self.page.goto(self._ui.url + path)

    def screenshot(self, name: str) -> None:
        """Keep what is shown."""
        self.page.wait_for_timeout(1500)  # for what is loaded late, and animations
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

    def picture(self, asset: str, name: str) -> Image.Image:
        """The picture that an asset's metadata shows under a name, as the browser has decoded it."""
        self.open(f"/assets/{asset}")
        row = self.page.locator("tr", has=self.page.get_by_text(name, exact=True)).first
        row.get_by_text("Show Markdown").click()
        image = self.page.locator(f'img[alt="{name.replace("_", " ")}"]')
        expect(image).to_be_visible(timeout=60_000)
        assert image.evaluate("i => i.complete && i.naturalWidth > 0"), "the browser cannot draw it"
        drawn: str = image.evaluate(
            """i => { const c = document.createElement("canvas"); c.width = i.naturalWidth; c.height = i.naturalHeight;
                      c.getContext("2d").drawImage(i, 0, 0); return c.toDataURL("image/png"); }"""
        )
        return Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2])))

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
        """The end of the next run that is not among the known ones. Leaves the page, which would draw all the time."""

        def started() -> dg.DagsterRun | None:
            return next((run for run in reversed(self._ui.platform.runs()) if run.run_id not in known), None)

        def ended() -> dg.DagsterRun | None:
            new = started()
            return new if new and new.is_finished else None

        self.until(started)
        self.rest()
        return self.until(ended)

    def rest(self) -> None:
        """Leave the UI."""
        self.page.goto("about:blank")

    def until(self, look: Callable[[], Any], seconds: float = _SECONDS) -> Any:
        """Look again and again until there is something."""
        deadline = time.monotonic() + seconds
        while not (found := look()):
            if time.monotonic() > deadline:
                self.screenshot("timeout")
                raise AssertionError(f"not within {seconds} s: {self.page.url}")
            self.page.wait_for_timeout(500)
        return found
