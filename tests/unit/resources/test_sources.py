"""Finding source files by path, folder and glob."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from housing_assets.deployments import load_resources
from resources.sources.listing import list_source
from step_scripts.runner.contract import StepError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", "notes.txt", ".hidden.csv", "_SUCCESS.csv", "deep/2024/c.csv", "deep/2025/d.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"X,Y\n1,2\n")
    return tmp_path


def _names(source: str, folder: Path) -> list[str]:
    return [Path(f.uri).relative_to(folder).as_posix() for f in list_source(source).files]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.csv", ["a.csv"]),
        ("", ["a.csv", "b.csv"]),
        ("notes.txt", ["notes.txt"]),
        ("_SUCCESS.csv", ["_SUCCESS.csv"]),
        ("*.csv", ["a.csv", "b.csv"]),
        ("[b-z].csv", ["b.csv"]),
        ("?.*", ["a.csv", "b.csv"]),
        ("deep/*/c.csv", ["deep/2024/c.csv"]),
        ("deep/*/*.csv", ["deep/2024/c.csv", "deep/2025/d.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "deep/2024/c.csv", "deep/2025/d.csv"]),
        ("deep/**/d.csv", ["deep/2025/d.csv"]),
    ],
)
def test_finds_sorted_files(folder: Path, pattern: str, expected: list[str]) -> None:
    assert _names(f"{folder}/{pattern}", folder) == expected


def test_endings_in_upper_case_and_what_else_a_folder_holds(folder: Path) -> None:
    (folder / "UPPER_CASE_ENDING.CSV").write_bytes(b"X,Y\n1,2\n")
    (folder / "odd.Csv").write_bytes(b"X,Y\n1,2\n")
    listing = list_source(str(folder))
    assert [Path(f.uri).name for f in listing.files] == ["UPPER_CASE_ENDING.CSV", "a.csv", "b.csv", "odd.Csv"]
    assert listing.others == ["deep/", "notes.txt"]
    assert _names(f"{folder}/*.csv", folder) == ["a.csv", "b.csv"], "a glob means what it says"


def test_home_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert _names("~/a.csv", folder) == ["a.csv"]
    assert _names("~", folder) == ["a.csv", "b.csv"]
    assert _names("~/deep/*/c.csv", folder) == ["deep/2024/c.csv"]
    with pytest.raises(StepError, match="~nobody-of-that-name"):
        list_source("~nobody-of-that-name/a.csv")
    location = load_resources({"HOUSING_RAW_CSV": "~/a.csv", "HOUSING_LANDING": "~/in"})["source_location"]
    assert (location.source, location.landing) == (f"{folder}/a.csv", f"{folder}/in")


def test_a_name_that_is_not_utf_8_is_set_aside_and_named(folder: Path) -> None:
    odd = os.fsdecode(bytes(folder) + b"/ums\xe4tze.csv")
    Path(odd).write_bytes(b"X,Y\n1,2\n")
    listing = list_source(str(folder))
    assert [Path(f.uri).name for f in listing.files] == ["a.csv", "b.csv"]
    assert [str(item) for item in listing.set_aside] == [f"{folder}/ums\\xe4tze.csv: its name is not UTF-8. Rename it"]
    for alone in (odd, f"{folder}/ums*.csv"):
        with pytest.raises(StepError) as raised:
            list_source(alone)
        assert "ums\\xe4tze.csv: its name is not UTF-8. Rename it" in str(raised.value)
        str(raised.value).encode()


def test_a_folder_that_cannot_be_listed_fails_a_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records whose file is only out of reach must not be marked deleted."""
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/2024"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StepError, match=r"deep/2024: the folder cannot be listed \(Permission denied\)"):
        list_source(f"{folder}/deep/**/*.csv")
    assert _names(f"{folder}/deep/2025/*.csv", folder) == ["deep/2025/d.csv"], "it is not in the way"


def test_a_pipe_is_no_source(folder: Path) -> None:
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(StepError, match="neither a regular file nor a folder"):
        list_source(str(folder / "pipe.csv"))
    assert _names(str(folder), folder) == ["a.csv", "b.csv"]


def test_a_change_is_seen_although_size_and_time_are_kept(folder: Path) -> None:
    path = folder / "a.csv"
    os.utime(path, (1_700_000_000, 1_700_000_000))
    [before] = list_source(str(path)).files
    assert list_source(str(path)).files == [before]
    path.write_bytes(b"X,Y\n1,3\n")
    os.utime(path, (1_700_000_000, 1_700_000_000))
    [written] = list_source(str(path)).files
    (folder / "other").write_bytes(b"X,Y\n1,4\n")
    os.utime(folder / "other", (1_700_000_000, 1_700_000_000))
    (folder / "other").replace(path)
    [replaced] = list_source(str(path)).files
    assert len({before.change, written.change, replaced.change}) == 3
    assert {(f.bytes, f.modified) for f in (before, written, replaced)} == {(8, 1_700_000_000.0)}


def test_size_and_time_are_those_of_the_file(folder: Path) -> None:
    os.utime(folder / "a.csv", (1_700_000_000, 1_700_000_000))
    (found,) = list_source(str(folder / "a.csv")).files
    assert (found.bytes, found.modified) == (8, 1_700_000_000.0)


def test_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (found,) = list_source("a.csv").files
    assert found.uri == str(folder / "a.csv")


@pytest.mark.parametrize(
    ("pattern", "fragments"),
    [
        ("z.csv", ["z.csv", "which holds _SUCCESS.csv, a.csv, b.csv, deep, notes.txt", "a glob such as"]),
        ("deep", ["which holds 2024, 2025", "*.csv"]),
        ("*.parquet", ["*.parquet", "a.csv", "glob"]),
        ("nowhere/*.csv", ["nowhere does not exist", "Correct the path"]),
        ("nowhere/a.csv", ["nowhere does not exist"]),
    ],
)
def test_nothing_found(folder: Path, pattern: str, fragments: list[str]) -> None:
    with pytest.raises(StepError) as raised:
        list_source(f"{folder}/{pattern}")
    for fragment in [str(folder), *fragments]:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(("source", "fragment"), [(" ", "no source"), ("gs://bucket/a.csv", "s3://")])
def test_unusable_source(source: str, fragment: str) -> None:
    with pytest.raises(StepError, match=fragment):
        list_source(source)
