"""Which files of the landing place are ingested, and when."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from housing_assets.landing import (
    WITHIN_A_LINE,
    LandingCursor,
    batches,
    day_of,
    files_of_days,
    landed_files,
    ready_files,
    run_key,
)
from step_scripts.parameters import SourceFile

NOW = 1_790_000_000.0
SETTLE = 60.0


def file(name: str, *, size: int = 10, age: float = 1000) -> SourceFile:
    return SourceFile(uri=f"/landing/{name}", bytes=size, modified=NOW - age)


def look(cursor: LandingCursor, *files: SourceFile, now: float = NOW) -> tuple[list[str], LandingCursor]:
    batch, following = cursor.look(files, now, SETTLE)
    return [f.uri.removeprefix("/landing/") for f in batch], following


def test_a_file_is_taken_at_the_second_look_and_once() -> None:
    first, cursor = look(LandingCursor(), file("a.csv"))
    second, cursor = look(cursor, file("a.csv"))
    third, cursor = look(cursor, file("a.csv"))
    assert (first, second, third) == ([], ["a.csv"], [])


def test_a_growing_file_waits_until_it_has_settled() -> None:
    cursor = LandingCursor()
    for size in (1, 2, 3):
        taken, cursor = look(cursor, file("a.csv", size=size, age=0))
        assert taken == []
    taken, cursor = look(cursor, file("a.csv", size=3, age=0))
    assert taken == [], "it was modified just now"
    taken, cursor = look(cursor, file("a.csv", size=3, age=0), now=NOW + SETTLE)
    assert taken == ["a.csv"]


@pytest.mark.parametrize(
    ("text", "waits"),
    [("A\n1\n", 1), ("A\r1\r", 1), ("A\n1\n ", 1), ("A\n1", WITHIN_A_LINE), ("", WITHIN_A_LINE)],
)
def test_a_file_that_ends_within_a_line_waits_longer(tmp_path: Path, text: str, waits: int) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, newline="")
    landed = [SourceFile(uri=str(path), bytes=len(text), modified=NOW)]
    assert ready_files(landed, NOW + SETTLE * waits - 1, SETTLE) == []
    assert ready_files(landed, NOW + SETTLE * waits, SETTLE) == landed


def test_a_replaced_file_is_taken_again_and_one_that_comes_back_too() -> None:
    _, cursor = look(LandingCursor(), file("a.csv"))
    _, cursor = look(cursor, file("a.csv"))
    waiting, cursor = look(cursor, file("a.csv", age=500))
    taken, cursor = look(cursor, file("a.csv", age=500))
    assert (waiting, taken) == ([], ["a.csv"])
    _, cursor = look(cursor)
    assert cursor == LandingCursor()
    _, cursor = look(cursor, file("a.csv", age=500))
    taken, cursor = look(cursor, file("a.csv", age=500))
    assert taken == ["a.csv"]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]), st.tuples(st.integers(0, 3), st.sampled_from([0.0, 30.0, 100.0]))
        ),
        max_size=12,
    )
)
def test_every_state_of_a_file_that_stays_is_taken_exactly_once(looks: list[dict[str, tuple[int, float]]]) -> None:
    """However files come, change and go: what is there in the end has been taken, and nothing twice in a row."""
    cursor, last_taken = LandingCursor(), dict[str, tuple[int, float]]()
    steps = [*looks, *([looks[-1]] * 3 if looks else [])]
    for number, present in enumerate(steps):
        now = NOW + 1000 * number
        files = [SourceFile(uri=f"/landing/{n}", bytes=size, modified=NOW - age) for n, (size, age) in present.items()]
        batch, cursor = cursor.look(files, now, SETTLE)
        # What a restart of the daemon keeps of it:
        cursor = LandingCursor.model_validate_json(cursor.model_dump_json())
        last_taken = {name: state for name, state in last_taken.items() if name in present}
        for taken in batch:
            name = taken.uri.removeprefix("/landing/")
            assert last_taken.get(name) != present[name], "taken twice"
            last_taken[name] = present[name]
    assert not looks or last_taken == looks[-1]


def test_the_day_comes_from_the_path_or_else_from_the_time_of_modification() -> None:
    assert day_of(file("2026-03-04/x.csv"), "/landing") == date(2026, 3, 4)
    assert day_of(file("sales_2026-03-04.csv"), "/landing") == date(2026, 3, 4)
    assert day_of(file("year=2026/month=3/day=04/x.csv"), "/landing") == date(2026, 3, 4)
    assert day_of(file("2026-03-99/x.csv", age=0), "/landing") == date(2026, 9, 21)
    assert day_of(file("x.csv", age=0), "/landing") == date(2026, 9, 21)
    assert day_of(file("x.csv", age=0), "/2020-01-01") == date(2026, 9, 21)


def test_run_keys_are_by_content() -> None:
    files = [file("2026-03-04/x.csv"), file("2026-03-05/y.csv"), file("2026-03-04/z.csv")]
    by_day = batches(files, "/landing")
    assert {str(day): len(of_day) for day, of_day in by_day.items()} == {"2026-03-04": 2, "2026-03-05": 1}
    day = date(2026, 3, 4)
    assert run_key(day, by_day[day]) == run_key(day, reversed(by_day[day]))
    assert run_key(day, by_day[day]) != run_key(day, [file("2026-03-04/x.csv"), file("2026-03-04/z.csv", size=11)])


def test_files_of_days_on_disk(tmp_path: Path) -> None:
    assert landed_files(str(tmp_path / "not-there-yet")) == ()
    for name, modified in (("2026-03-04/old.csv", 1e9), ("2026-03-04/fresh.csv", NOW), ("2026-03-05/x.csv", 1e9)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        os.utime(path, (modified, modified))
    ready, waiting = files_of_days(str(tmp_path), [date(2026, 3, 4)], NOW, SETTLE)
    assert [f.uri.rpartition("/")[2] for f in ready] == ["old.csv"]
    assert waiting == 1
