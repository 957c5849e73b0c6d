"""What the documentation says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from housing_assets.config import check_run_config
from housing_assets.reference import reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "benchmarks").glob("*.md")])


def test_the_configuration_page_is_generated_from_the_code() -> None:
    """After a change: `python -m housing_assets.reference > docs/configuration.md`."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for target in re.findall(r"\bmake ([a-z-]+)", block):
            assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_run_configuration_in_examples_is_valid(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        document = yaml.safe_load(block)
        if isinstance(document, dict) and "ops" in document:
            check_run_config(document)
