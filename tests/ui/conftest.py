"""A Dagster UI with its daemon, and a headless Chromium that looks at it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.platform_cli import ROOT, Platform
from tests.ports import free_port
from tests.ui.browser import Browser, UserInterface
from tests.waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = ROOT / "tests" / "ui" / "screenshots"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """The installation behind the UI: one a module, which may have its own."""
    return Platform(tmp_path_factory.mktemp("ui"), {"HOUSING_SAMPLE_ROWS": "2000"})


@pytest.fixture(scope="module")
def ui(platform: Platform) -> Iterator[UserInterface]:
    """`dagster dev`, as `make ui` starts it."""
    port = free_port()
    log = platform.folder / "ui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=platform.env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _await_server(url, process, log)
            yield UserInterface(url, platform)
        finally:
            _end(process)
            platform.stop()


@pytest.fixture(scope="module")
def browser(ui: UserInterface) -> Iterator[Browser]:
    """Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(exist_ok=True)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = chromium.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(120_000)
        yield Browser(page, ui, SCREENSHOTS)
        chromium.close()


def _await_server(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            urllib.request.urlopen(url + "/server_info", timeout=5).close()
            return True
        return False

    until(answers, process=process, log=log)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *family] if process.poll() is None else family, 30)
    for left in alive:
        left.kill()
    process.wait(30)
