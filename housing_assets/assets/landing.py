"""The landing place: which of its files are ready, to which day they belong, which of them are new.

A file is ready when it has not changed for a while. Its day is the date in its path (`2026-11-23` or
`year=2026/month=11/day=23`), or else the day, in the configured time zone, on which it was last modified: a file that
is put in another's place belongs to the day on which that happened. What cannot be ingested is set aside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from zoneinfo import ZoneInfo

from pydantic import BaseModel

from resources.sources.folder_search import Listing, SetAside
from resources.sources.listing import absolute, ends_within_a_line
from step_scripts.parameters import SourceFile
from step_scripts.runner.local_files import lasting

WITHIN_A_LINE = 10
_DATE = re.compile(r"(?<!\d)(\d{4})-(\d{2})-(\d{2})(?!\d)|year=(\d{4})/month=(\d{1,2})/day=(\d{1,2})(?!\d)")
REMEMBERED_FILES = 2000  # one by one; of what is more, a digest a day
_MARK = 10  # digits that stand for a file and its state
_CLOCKS_DIFFER = 300.0  # by so many seconds at most, or a file is from the future


def day_of(file: SourceFile, landing: str, timezone: str) -> date:
    """The day of ingestion that a file belongs to."""
    for found in reversed(list(_DATE.finditer(file.uri.removeprefix(absolute(landing))))):
        year, month, day = (int(part) for part in found.groups() if part)
        try:
            return date(year, month, day)
        except ValueError:  # looks like a date, and is none
            continue
    try:
        return datetime.fromtimestamp(file.modified, ZoneInfo(timezone)).date()
    except (OverflowError, ValueError):  # the first or the last day of the calendar, in another time zone
        return date.min if file.modified < 0 else date.max


def ready_files(files: Iterable[SourceFile], now: float, settle_seconds: float) -> list[SourceFile]:
    """Those that were last modified at least `settle_seconds` before `now` (seconds since 1970).

    A file that ends within a line may be one that is still being written: it waits `WITHIN_A_LINE` times as long.
    """
    settled = [file for file in files if now - file.modified >= settle_seconds]
    return [f for f in settled if now - f.modified >= WITHIN_A_LINE * settle_seconds or not ends_within_a_line(f.uri)]


def files_of_days(
    listing: Listing, landing: str, timezone: str, days: Iterable[date], now: float, settle_seconds: float
) -> tuple[list[SourceFile], int]:
    """The ready files of the days, and how many of those days are not ready yet."""
    wanted = set(days)
    files = [file for file in listing.files if day_of(file, landing, timezone) in wanted]
    ready = ready_files(files, now, settle_seconds)
    return ready, len(files) - len(ready)


def files_by_day(
    listing: Listing, landing: str, timezone: str, first: date, now: float
) -> tuple[dict[date, list[SourceFile]], list[SetAside]]:
    """The files of the days that can be ingested, from `first` to today, days in order; and what is set aside."""
    today = datetime.fromtimestamp(now, ZoneInfo(timezone)).date()
    by_day: dict[date, list[SourceFile]] = {}
    aside = list(listing.set_aside)
    for file in listing.files:
        day = day_of(file, landing, timezone)
        if day < first:
            remedy = "Put the right date into its path (or: touch), or set HOUSING_LANDING_START to an earlier day"
            aside.append(SetAside(file.uri, f"its day, {day}, is before HOUSING_LANDING_START ({first})", remedy))
        elif day > today:
            remedy = f"It is taken when the day comes ({timezone}). Sooner: correct the date in its path (or: touch)"
            aside.append(SetAside(file.uri, f"its day, {day}, is in the future", remedy))
        elif file.modified > now + _CLOCKS_DIFFER:
            when = datetime.fromtimestamp(file.modified, ZoneInfo(timezone)).isoformat(timespec="seconds")
            remedy = "It is taken when that time has come. Sooner: touch"
            aside.append(SetAside(file.uri, f"its time of modification, {when}, is in the future", remedy))
        else:
            by_day.setdefault(day, []).append(file)
    return dict(sorted(by_day.items())), aside


class LandingCursor(BaseModel):
    """What the sensor remembers, day by day: files that it has handed on, and files seen once and not yet handed on.

    A file is a mark of its place and state. Of `REMEMBERED_FILES` files of the newest days the marks are kept, of a
    day before those one digest: if it does not fit, the day's files count as new, which adds nothing but a run.
    """

    taken: dict[str, str] = {}
    seen: dict[str, str] = {}
    notified: list[str] = []

    def look(
        self, by_day: Mapping[date, Sequence[SourceFile]], now: float, settle_seconds: float
    ) -> tuple[dict[date, list[SourceFile]], int, LandingCursor]:
        """The files to ingest now, by day; how many are not ready yet; what to remember.

        New and replaced files are taken when two looks found them the same and `settle_seconds` have passed since
        their modification. Files that are gone are forgotten, so a file that comes back is taken again.
        """
        batches: dict[date, list[SourceFile]] = {}
        taken: dict[str, set[str]] = {}
        seen: dict[str, set[str]] = {}
        for day, files in by_day.items():
            key, marks = str(day), {mark(file): file for file in files}
            known = _known(self.taken.get(key, ""), set(marks))
            new = set(marks) - known
            # Of too many new files it cannot be remembered which were seen: then the time alone decides.
            twice = new if len(new) > REMEMBERED_FILES else _known(self.seen.get(key, ""), new)
            settled = {mark(file) for file in ready_files((marks[m] for m in twice), now, settle_seconds)}
            if settled:
                batches[day] = [file for m, file in marks.items() if m in settled]
            taken[key], seen[key] = known | settled, new - settled
        waiting = sum(map(len, seen.values()))
        return batches, waiting, LandingCursor(taken=_bounded(taken), seen=_bounded(seen), notified=self.notified)

    def unreported(self, aside: Sequence[SetAside]) -> tuple[list[SetAside], LandingCursor]:
        """Those that were not reported yet, and the cursor once they are."""
        listed = sorted(aside, key=lambda item: item.name)[:REMEMBERED_FILES]
        marks = {_digest(f"{item.name} {item.reason}")[:_MARK]: item for item in listed}
        fresh = [item for m, item in marks.items() if m not in set(self.notified)]
        return fresh, self.model_copy(update={"notified": sorted(marks)})


def _known(remembered: str, present: set[str]) -> set[str]:
    """Those of the marks `present` that are remembered."""
    if remembered.startswith("="):
        return set(present) if remembered == _digest_of(present) else set()
    return present & {remembered[i : i + _MARK] for i in range(0, len(remembered), _MARK)}


def _bounded(by_day: Mapping[str, set[str]]) -> dict[str, str]:
    """The marks of each day in one text, of the newest days; of the others a digest."""
    left, kept = REMEMBERED_FILES, {}
    for day in sorted(by_day, reverse=True):
        if marks := by_day[day]:
            left -= len(marks)
            kept[day] = "".join(sorted(marks)) if left >= 0 else _digest_of(marks)
    return dict(sorted(kept.items()))


def _digest_of(marks: Iterable[str]) -> str:
    return "=" + _digest("".join(sorted(marks)))[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def mark(file: SourceFile) -> str:
    """Digits that stand for a file in the state in which it is."""
    return _digest(f"{file.uri}\0{file.bytes} {file.modified!r} {lasting(file.change)}")[:_MARK]


def run_key(day: date, files: Iterable[SourceFile]) -> str:
    """Identifies a batch by its files and their states."""
    return f"{day}-{_digest(' '.join(sorted(mark(file) for file in files)))[:16]}"
