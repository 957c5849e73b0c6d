"""Finding source files by path, folder and glob."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resources.sources import find_source_files
from step_scripts.contract import StepError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", "notes.txt", ".hidden.csv", "_SUCCESS.csv", "deep/2024/c.csv", "deep/2025/d.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"X,Y\n1,2\n")
    return tmp_path


def _names(source: str, folder: Path) -> list[str]:
    return [Path(f.uri).relative_to(folder).as_posix() for f in find_source_files(source)]


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


def test_size_and_time_are_those_of_the_file(folder: Path) -> None:
    os.utime(folder / "a.csv", (1_700_000_000, 1_700_000_000))
    (found,) = find_source_files(str(folder / "a.csv"))
    assert (found.bytes, found.modified) == (8, 1_700_000_000.0)


def test_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (found,) = find_source_files("a.csv")
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
        find_source_files(f"{folder}/{pattern}")
    for fragment in [str(folder), *fragments]:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(("source", "fragment"), [(" ", "no source"), ("gs://bucket/a.csv", "s3://")])
def test_unusable_source(source: str, fragment: str) -> None:
    with pytest.raises(StepError, match=fragment):
        find_source_files(source)
