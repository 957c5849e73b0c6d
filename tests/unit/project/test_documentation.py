"""What the documentation says is what the code does."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml

import housing_assets.config  # noqa: F401  # the assets' configuration
from housing_assets.automation.jobs import DecisionConfig
from housing_assets.config_fields import CONFIG_OF_OP, check_run_config, unknown_fields
from housing_assets.deployments import load_resources
from housing_assets.maintenance.retention import PruneConfig
from housing_assets.maintenance.teardown import TeardownConfig
from tests import ROOT
from tests.documented import commands, files, mentions, pages
from tests.unit.project.configuration_page import reference

CONFIGS = {
    **CONFIG_OF_OP,
    **dict.fromkeys(("approve", "reject"), DecisionConfig),
    "prune_old": PruneConfig,
    "remove_everything": TeardownConfig,
}
INSTANCE = yaml.safe_load((ROOT / "deploy" / "dagster.yaml").read_text())
AWS = {
    "HOUSING_DEPLOYMENT": "sagemaker",
    "HOUSING_ROOT": "s3://bucket/housing",
    "HOUSING_ROLE_ARN": "role",
    "HOUSING_IMAGE": "image",
}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "benchmarks").glob("*.md")])


def test_the_configuration_page_is_generated_from_the_code() -> None:
    """After a change: `python -m tests.unit.project.configuration_page > docs/configuration.md`."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_places_that_contributing_names_exist() -> None:
    """Paths, rooms, anchors, and the names in the code."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    spans = set(re.findall(r"`([^`\n]+)`", text))
    paths = {span for span in spans if "/" in span and re.fullmatch(r"[\w./-]+", span)}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
    rooms = set(re.findall(r"ROOM=(\S+?)[`\s]", text))
    assert rooms
    assert sorted(room for room in rooms if not (ROOT / "tests" / "unit" / room).is_dir()) == []
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    code = "\n".join(
        file.read_text()
        for folder in ("housing_assets", "resources", "step_scripts", "tests")
        for file in (ROOT / folder).rglob("*.py")
    )
    words = set(re.findall(r"\w+", code + (ROOT / "pyproject.toml").read_text().replace("-", "_")))
    names = {span.replace("-", "_") for span in spans if re.fullmatch(r"[A-Za-z_]\w*|[a-z]+(-[a-z]+)+", span)}
    assert sorted(names - words) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for target in re.findall(r"\bmake ([a-z-]+)", block):
            assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_configuration_in_examples_is_valid(page: Path, tmp_path: Path) -> None:
    for kind, block in re.findall(r"```(yaml|json)\n(.*?)```", page.read_text(), re.DOTALL):
        document = json.loads(block) if kind == "json" else yaml.safe_load(textwrap.dedent(block))
        if kind == "json":
            assert document["Statement"], "a policy"
        elif "ops" in document:
            check_run_config(document)
            for op, section in document["ops"].items():
                assert not list(unknown_fields(CONFIGS[op], section["config"], op))
                CONFIGS[op](**section["config"])
        elif document.keys() & INSTANCE.keys():
            assert document.items() <= INSTANCE.items(), "what make run puts into dagster.yaml"
        else:
            file = tmp_path / "sections.yaml"
            file.write_text(block)
            load_resources({**AWS, "HOUSING_SAGEMAKER_CONFIG": str(file)})


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_installed_exists(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in (shlex.split(command) for command in commands(page) if "pip install" in command):
        [target] = [word for word in words if word.startswith(".[")]
        assert set(target[2:-1].split(",")) <= extras.keys(), f"{page.name}: {target}"
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def test_commands_are_found_in_all_their_forms(tmp_path: Path) -> None:
    """A page's commands are what other tests run: none may be overlooked."""
    page = tmp_path / "page.md"
    page.write_text(
        "Use `make ui`, `dagster.yaml`, `make` or `HOUSING_A=b`.\n"
        "```bash\nexport A=$PWD/b   # a comment\n\nA='x y' make run  # z\nmake \\\n  stop\n```\n"
        "  ```yaml\n  # my.yaml: dagster job execute -c my.yaml\n  ops: {}\n  ```\n"
        "```\nraw_csv ─▶ feature_group\ncurl -s localhost\n```\n"
        "```python\nmake = 1\n```\n"
    )
    found = ["export A=$PWD/b", "A='x y' make run", "make stop", "dagster job execute -c my.yaml", "curl -s localhost"]
    assert commands(page) == found
    assert list(files(page)) == ["my.yaml"]
    assert yaml.safe_load(files(page)["my.yaml"]) == {"ops": {}}
    assert mentions(page) == ["make ui"]
