"""Which files of the landing place are ingested, and when; which are set aside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from housing_assets.assets.landing import (
    REMEMBERED_FILES,
    WITHIN_A_LINE,
    LandingCursor,
    day_of,
    files_by_day,
    files_of_days,
    ready_files,
    run_key,
)
from housing_assets.partitions import ingestion_days
from resources.sources.folder_search import Listing
from resources.sources.listing import list_landing
from step_scripts.parameters import SourceFile
from step_scripts.runner.local_files import FileState

NOW = 1_790_000_000.0  # 2026-09-21, 14:13 UTC
TODAY = date(2026, 9, 21)
SETTLE = 60.0
ZONES = ("UTC", "Pacific/Auckland", "America/Los_Angeles", "Asia/Kolkata", "Pacific/Kiritimati")


def file(name: str, *, size: int = 10, age: float = 1000, change: str = "1") -> SourceFile:
    return SourceFile(uri=f"/landing/{name}", bytes=size, modified=NOW - age, change=change)


def look(
    cursor: LandingCursor, *files: SourceFile, now: float = NOW, day: date = TODAY
) -> tuple[list[str], LandingCursor]:
    batches, _, following = cursor.look({day: files} if files else {}, now, SETTLE)
    taken = [f.uri.removeprefix("/landing/") for batch in batches.values() for f in batch]
    return taken, LandingCursor.model_validate_json(
        following.model_dump_json()
    )  # what a restart of the daemon keeps of it


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


@pytest.mark.parametrize("other", [file("a.csv", age=500), file("a.csv", size=11), file("a.csv", change="2")])
def test_a_replaced_file_is_taken_again_and_one_that_comes_back_too(other: SourceFile) -> None:
    _, cursor = look(LandingCursor(), file("a.csv"))
    _, cursor = look(cursor, file("a.csv"))
    waiting, cursor = look(cursor, other)
    taken, cursor = look(cursor, other)
    assert (waiting, taken) == ([], ["a.csv"])
    _, cursor = look(cursor)
    assert cursor == LandingCursor()
    _, cursor = look(cursor, other)
    taken, cursor = look(cursor, other)
    assert taken == ["a.csv"]


def test_what_makes_up_inodes_is_taken_all_the_same() -> None:
    """As sshfs and others do, which would otherwise never look the same twice."""
    _, cursor = look(LandingCursor(), file("a.csv", change="5 inode 1"))
    taken, cursor = look(cursor, file("a.csv", change="5 inode 2"))
    assert taken == ["a.csv"]
    assert look(cursor, file("a.csv", change="5 inode 3"))[0] == []


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
    cursor, last_taken = LandingCursor(), dict[str, SourceFile]()
    states: dict[str, tuple[tuple[int, float], int]] = {}
    steps = [*looks, *([looks[-1]] * 3 if looks else [])]
    files: list[SourceFile] = []
    for number, present in enumerate(steps):
        now = NOW + 1000 * number
        files = []
        for name, (size, age) in present.items():
            if name not in states or states[name][0] != (size, age):
                states[name] = ((size, age), number)  # every change has a time of its own
            files.append(file(name, size=size, age=age, change=str(states[name][1])))
        batches, _, cursor = cursor.look({TODAY: files}, now, SETTLE)
        cursor = LandingCursor.model_validate_json(cursor.model_dump_json())
        last_taken = {name: state for name, state in last_taken.items() if name in present}
        for taken in batches.get(TODAY, []):
            name = taken.uri.removeprefix("/landing/")
            assert last_taken.get(name) != taken, "taken twice"
            last_taken[name] = taken
    assert not looks or list(last_taken.values()) == sorted(files, key=lambda f: list(last_taken).index(f.uri[9:]))


def test_the_cursor_does_not_grow_with_every_file() -> None:
    """More files than are remembered one by one: each is taken once, and a new one among them is found."""
    days = [date(2026, 9, day) for day in range(1, 22)]
    each = REMEMBERED_FILES // 7
    landed = {day: [file(f"{day}/{number}.csv") for number in range(each)] for day in days}
    cursor, taken, waiting = LandingCursor(), 0, 0
    for _ in range(4):
        batches, waiting, cursor = cursor.look(landed, NOW, SETTLE)
        taken += sum(map(len, batches.values()))
        cursor = LandingCursor.model_validate_json(cursor.model_dump_json())
    text = cursor.model_dump_json()
    assert (taken, waiting) == (len(days) * each, 0)
    assert len(text) < 12 * REMEMBERED_FILES, "not the length of the names of so many files"
    late = file(f"{days[0]}/late.csv")
    landed[days[0]].append(late)
    found: set[str] = set()
    for _ in range(3):
        batches, _, cursor = cursor.look(landed, NOW, SETTLE)
        assert set(batches) <= {days[0]}, "the other days are as they were"
        found |= {f.uri for f in batches.get(days[0], [])}
    assert late.uri in found
    assert cursor.look(landed, NOW, SETTLE)[0] == {}


def test_a_day_of_more_files_than_are_remembered_is_not_put_off_for_ever() -> None:
    files, cursor, taken = [file(f"{number}.csv") for number in range(REMEMBERED_FILES + 1)], LandingCursor(), 0
    for number in range(3):
        files.append(file(f"one more {number}.csv"))
        batches, _, cursor = cursor.look({TODAY: files}, NOW, SETTLE)
        taken += len(batches)
    assert taken


@pytest.mark.parametrize("text", ["yesterday", "[]", "7", '{"taken": 3}', '{"taken": {"2026-09-21": 4}}'])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="LandingCursor"):
        LandingCursor.model_validate_json(text)


def test_the_day_comes_from_the_path_or_else_from_the_time_of_modification() -> None:
    def day(name: str, landing: str = "/landing", timezone: str = "UTC", age: float = 0) -> date:
        return day_of(file(name, age=age), landing, timezone)

    assert day("2026-03-04/x.csv") == date(2026, 3, 4)
    assert day("sales_2026-03-04.csv") == date(2026, 3, 4)
    assert day("year=2026/month=3/day=04/x.csv") == date(2026, 3, 4)
    assert day("2026-03-99/x.csv") == TODAY
    assert day("x.csv") == TODAY
    assert day("x.csv", "/2020-01-01") == TODAY
    assert day("x.csv", timezone="Pacific/Auckland") == date(2026, 9, 22)
    assert day("x.csv", timezone="America/Los_Angeles", age=8 * 3600) == date(2026, 9, 20)
    assert day("x.csv", age=NOW + 62_135_596_800, timezone="America/Los_Angeles") == date.min


@given(
    st.sampled_from(ZONES),
    st.datetimes(datetime(2026, 1, 2), datetime(2028, 1, 1)),
    st.integers(-700, 3),
    st.booleans(),
)
def test_days_that_are_asked_for_are_days_of_ingestion(timezone: str, at: datetime, offset: int, dated: bool) -> None:
    """Dagster refuses a run for any other day, and with it all other runs of the look."""
    first, moment = date(2025, 12, 24), at.replace(tzinfo=UTC)
    now = moment.timestamp()
    day = date.fromordinal(moment.astimezone(ZoneInfo(timezone)).date().toordinal() + offset)
    name = f"/landing/{day}/x.csv" if dated else "/landing/x.csv"
    modified = now - 100 if dated else now + 86_400 * offset
    listing = Listing([SourceFile(uri=name, bytes=1, modified=modified)])
    by_day, aside = files_by_day(listing, "/landing", timezone, first, now)
    known = ingestion_days(first, timezone).get_partition_keys(current_time=moment)
    assert {str(day) for day in by_day} <= set(known)
    assert len(by_day) + len(aside) == 1
    if dated:
        assert (str(day) in known) == bool(by_day), "what can be ingested is not set aside"


def test_a_file_that_was_set_aside_for_its_day_is_taken_when_the_day_comes() -> None:
    listing = Listing([file("2026-09-21/now.csv"), file("2026-09-23/x.csv"), file("2020-09-23/old.csv")])
    cursor, taken = LandingCursor(), list[str]()
    for hours in range(0, 72, 4):
        now = NOW + 3600 * hours
        by_day, aside = files_by_day(listing, "/landing", "Europe/Berlin", date(2025, 1, 1), now)
        batches, _, cursor = cursor.look(by_day, now, SETTLE)
        taken += [f"{hours}: {day}" for day in batches]
        if not hours:
            assert [str(item) for item in aside] == [
                "/landing/2026-09-23/x.csv: its day, 2026-09-23, is in the future. It is taken when the day comes "
                "(Europe/Berlin). Sooner: correct the date in its path (or: touch)",
                "/landing/2020-09-23/old.csv: its day, 2020-09-23, is before HOUSING_LANDING_START (2025-01-01). Put "
                "the right date into its path (or: touch), or set HOUSING_LANDING_START to an earlier day",
            ]
    assert taken == ["4: 2026-09-21", "36: 2026-09-23"], "seen at 00:13, taken at the next look"


def test_a_time_of_modification_in_the_future_is_said() -> None:
    listing = Listing([file("2026-09-21/x.csv", age=-7200), file("2026-09-21/y.csv", age=-2)])
    by_day, [aside] = files_by_day(listing, "/landing", "Europe/Berlin", date(2025, 1, 1), NOW)
    assert [f.uri for f in by_day[TODAY]] == ["/landing/2026-09-21/y.csv"], "clocks differ a little"
    assert "its time of modification, 2026-09-21T18:13:20+02:00, is in the future" in str(aside)


def test_what_is_set_aside_is_told_once() -> None:
    old, new = (
        files_by_day(Listing([file(name)]), "/landing", "UTC", date(2025, 1, 1), NOW)[1]
        for name in ("2020-01-01/a.csv", "2020-01-01/b.csv")
    )
    fresh, cursor = LandingCursor().unreported(old)
    assert fresh == old
    cursor = LandingCursor.model_validate_json(cursor.model_dump_json())
    fresh, cursor = cursor.unreported([*new, *old])
    assert fresh == new
    fresh, cursor = cursor.unreported(new)
    assert (fresh, len(cursor.notified)) == ([], 1), "what is gone is forgotten"


def test_run_keys_are_by_content() -> None:
    listing = Listing([file("2026-03-04/x.csv"), file("2026-03-05/y.csv"), file("2026-03-04/z.csv")])
    by_day, _ = files_by_day(listing, "/landing", "UTC", date(2025, 1, 1), NOW)
    assert {str(day): len(of_day) for day, of_day in by_day.items()} == {"2026-03-04": 2, "2026-03-05": 1}
    day = date(2026, 3, 4)
    assert run_key(day, by_day[day]) == run_key(day, reversed(by_day[day]))
    assert run_key(day, by_day[day]) != run_key(day, [file("2026-03-04/x.csv"), file("2026-03-04/z.csv", size=11)])


def test_files_of_days_on_disk(tmp_path: Path) -> None:
    assert list_landing(str(tmp_path / "not-there-yet")) is None
    for name, modified in (("2026-03-04/old.CSV", 1e9), ("2026-03-04/fresh.csv", NOW), ("2026-03-05/x.csv", 1e9)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        os.utime(path, (modified, modified))
    listing = list_landing(str(tmp_path))
    assert listing is not None
    ready, waiting = files_of_days(listing, str(tmp_path), "UTC", [date(2026, 3, 4)], NOW, SETTLE)
    assert [f.uri.rpartition("/")[2] for f in ready] == ["old.CSV"]
    assert waiting == 1


def names(found: Mapping[str, object] | Listing, folder: Path) -> list[str]:
    assert isinstance(found, Listing)
    return [Path(f.uri).relative_to(folder).as_posix() for f in found.files]


def test_things_that_cannot_be_read_do_not_keep_the_others(tmp_path: Path) -> None:
    (tmp_path / "2026-03-04").mkdir()
    for name in ("2026-03-04/good.csv", "good.csv", "notes.txt", "sales.csv.gz"):
        (tmp_path / name).write_text("x")
    Path(os.fsdecode(bytes(tmp_path) + b"/ums\xe4tze.csv")).write_text("x")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.csv").symlink_to("itself.csv")
    listing = list_landing(str(tmp_path))
    assert listing is not None
    assert names(listing, tmp_path) == ["2026-03-04/good.csv", "good.csv"]
    aside = {item.name.removeprefix(f"{tmp_path}/"): item.reason for item in listing.set_aside}
    assert aside == {
        "gone.csv": "it is a link that leads nowhere",
        "itself.csv": "it cannot be read (Too many levels of symbolic links)",
        "pipe.csv": "it is no regular file",
        "ums\\xe4tze.csv": "its name is not UTF-8",
    }
    assert listing.others == ["notes.txt", "sales.csv.gz"]


@pytest.mark.parametrize("modified", [-1e11, 1e12])
def test_a_time_that_no_calendar_has_is_set_aside(modified: float) -> None:
    """Not every file system can hold one."""
    found = Listing()
    found.add("/landing/x.csv", FileState(1, modified, "1"))
    assert found.files == []
    assert "is in no calendar" in found.set_aside[0].reason


def test_a_folder_that_cannot_be_listed_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed/a.csv", "open/b.csv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything
        if path.endswith("/closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_landing(str(tmp_path))
    assert listing is not None
    assert names(listing, tmp_path) == ["open/b.csv"]
    [aside] = listing.set_aside
    assert str(aside) == (
        f"{tmp_path}/closed: the folder cannot be listed (Permission denied). Allow it to be read and searched"
    )


def test_loops_of_links_end_and_a_file_is_read_once(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.csv").write_text("x")
        (tmp_path / folder / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    (tmp_path / "latest.csv").symlink_to(tmp_path / "b" / "b.csv")
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.csv").write_text("x")
    (tmp_path / "c").symlink_to(elsewhere)
    listing = list_landing(str(tmp_path))
    assert listing is not None
    assert names(listing, tmp_path) == ["a/a.csv", "b/b.csv", "c/c.csv"]
    assert "a/up (a link back to a folder above it)" in listing.others
    assert f"latest.csv (a link to {tmp_path}/b/b.csv)" in listing.others
    assert listing.set_aside == []
