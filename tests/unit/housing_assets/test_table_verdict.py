"""A wrong table, slice or range is an error when the code location loads; what was found is kept."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from housing_assets import table_verdict
from housing_assets.config import SLICES
from housing_assets.schema import HOUSING_TABLE
from housing_assets.table_verdict import check_table
from step_scripts.parameters import Slice
from tests import ROOT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "housing-assets"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, to be edited."""
    folder = tmp_path_factory.mktemp("project")
    for package in ("housing_assets", "resources", "step_scripts"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def in_project(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(project), "XDG_CACHE_HOME": str(project / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("right_words", "wrong_words", "message"),
    [
        ('target="PRICE"', 'target="PRIZE"', "table 'house_sales' has no column ['PRIZE']"),
        ("pa.Field(ge=0, le=1e9,", "pa.Field(ne=0,", "HouseSale.PRICE: check not_equal_to is not supported"),
    ],
)
def test_a_wrong_schema_is_an_error_of_dagster_definitions_validate(
    project: Path, right_words: str, wrong_words: str, message: str
) -> None:
    """`right_words` are text of `schema.py`: if you change a range there, change them here."""
    schema = project / "housing_assets" / "schema.py"
    right = schema.read_text()
    line = next(n for n, text in enumerate(right.splitlines(), 1) if text.startswith("HOUSING_TABLE"))
    assert right_words in right
    schema.write_text(right.replace(right_words, wrong_words))
    try:
        done = in_project(project, "-m", "dagster", "definitions", "validate", "-m", "housing_assets.definitions")
    finally:
        schema.write_text(right)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert f"the table cannot be used: {schema}, line {line}" in said
    assert message in said


def test_what_is_kept_is_asked_again_when_the_schema_changes(cache: Path, project: Path) -> None:
    program = "from housing_assets.table_verdict import check_table; print(check_table([], {}).column_names)"
    first = in_project(project, "-c", program)
    assert "DECK" in first.stdout, first.stderr
    (kept,) = (project / "cache" / "housing-assets").iterdir()
    schema = project / "housing_assets" / "schema.py"
    right = schema.read_text()
    schema.write_text(right.replace("DECK:", "TERRACE:"))
    try:
        second = in_project(project, "-c", program)
    finally:
        schema.write_text(right)
    assert "TERRACE" in second.stdout, second.stderr
    assert list(kept.parent.iterdir()) == [kept], "one file for each place"


def test_a_kept_verdict_needs_no_child_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_table(SLICES, {}) == HOUSING_TABLE
    (kept,) = cache.iterdir()
    assert (kept.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)
    monkeypatch.setattr(table_verdict.sys, "executable", "/nowhere/python")
    assert check_table(SLICES, {"PRICE": {"minimum": 5.0}}) == HOUSING_TABLE
    kept.write_text("{}")
    with pytest.raises(FileNotFoundError, match="/nowhere/python"):
        check_table(SLICES, {})


def test_wrong_slices_and_ranges_are_named(cache: Path) -> None:
    wrong = (Slice(name="rooms", column="ROOMS", bands=3),)
    with pytest.raises(ValueError, match=r"SLICES in .*config\.py: slice 'rooms': there is no column ROOMS"):
        check_table(wrong, {})
    with pytest.raises(ValueError, match="slice 'size': give either `width` or `bands`"):
        check_table((Slice(name="size", column="SQUARE_FEET"),), {})
    with pytest.raises(ValueError, match=re.escape("HOUSING_CONFIG: raw_csv.column_ranges names ['PRIZE']")):
        check_table(SLICES, {"PRIZE": {"minimum": 1.0}})


def test_where_nothing_can_be_kept_the_table_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made below it, also not by root
    assert check_table(SLICES, {}) == HOUSING_TABLE
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    assert check_table(SLICES, {}) == HOUSING_TABLE
    assert list(tmp_path.iterdir()) == [file]
