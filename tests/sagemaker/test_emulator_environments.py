"""Images whose containers install packages: each host has an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sagemaker_emulator import Image, SageMakerEmulator
from tests.sagemaker_emulator.testing import IMAGE, Aws

# Says what is there, and installs a module that is named after its host.
INSTALL = """
import os, pathlib, site, sys
folder = pathlib.Path(site.getsitepackages()[0])
print("found", sorted(p.name for p in folder.glob("algo*.py")), flush=True)
(folder / (os.environ["HOSTNAME"].replace("-", "_") + ".py")).touch()
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "image")], check=True)
    return tmp_path / "image"


@pytest.fixture(params=["auto", "loopback"])
def installing(request: pytest.FixtureRequest, environment: Path) -> Iterator[Aws]:
    image = Image(python=str(environment / "bin" / "python3"), installs=True)
    with SageMakerEmulator(images={IMAGE: image}, isolation=request.param, stop_grace=3) as emulator:
        yield Aws(emulator.endpoint_url, emulator)


def found(aws: Aws, job: str, code: int = 0, hosts: int = 1) -> list[str]:
    """What each host of a job found installed, and not by itself."""
    aws.train(job, INSTALL, hosts, Environment={"CODE": str(code)})
    return [lines[0] for lines in aws.logs(job).values()]


def test_hosts_install_for_themselves_and_for_later_jobs_of_the_image(installing: Aws, environment: Path) -> None:
    assert found(installing, "broken", code=1) == ["found []"]
    assert found(installing, "first", hosts=2) == ["found []"] * 2  # nothing of a job that failed, or of each other
    (kept,) = found(installing, "second")
    assert kept in ("found ['algo_1.py']", "found ['algo_2.py']")
    assert not list(environment.rglob("algo*.py"))
