"""The landing place: which of its files are ready, to which day they belong, which of them are new.

A file is ready when it has not changed for a while. Its day is the date in its path (`2026-11-23` or
`year=2026/month=11/day=23`), or else the day (UTC) on which it was last modified: a file that is put in another's place
belongs to the day on which that happened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime

from pydantic import BaseModel

from resources.sources import ends_within_a_line, find_source_files
from step_scripts.contract import StepError
from step_scripts.parameters import SourceFile

WITHIN_A_LINE = 10
_DATE = re.compile(r"(?<!\d)(\d{4})-(\d{2})-(\d{2})(?!\d)|year=(\d{4})/month=(\d{1,2})/day=(\d{1,2})(?!\d)")


def landed_files(landing: str) -> tuple[SourceFile, ...]:
    """All CSV files below the landing place; none if there is no such place yet."""
    try:
        return find_source_files(landing.rstrip("/") + "/**/*.csv")
    except StepError:
        return ()


def day_of(file: SourceFile, landing: str) -> date:
    """The day of ingestion that a file belongs to."""
    for found in reversed(list(_DATE.finditer(file.uri.removeprefix(landing)))):
        year, month, day = (int(part) for part in found.groups() if part)
        try:
            return date(year, month, day)
        except ValueError:  # looks like a date, and is none
            continue
    return datetime.fromtimestamp(file.modified, UTC).date()


def ready_files(files: Iterable[SourceFile], now: float, settle_seconds: float) -> list[SourceFile]:
    """Those that were last modified at least `settle_seconds` before `now` (seconds since 1970).

    A file that ends within a line may be one that is still being written: it waits `WITHIN_A_LINE` times as long.
    """
    settled = [file for file in files if now - file.modified >= settle_seconds]
    return [f for f in settled if now - f.modified >= WITHIN_A_LINE * settle_seconds or not ends_within_a_line(f.uri)]


def files_of_days(
    landing: str, days: Iterable[date], now: float, settle_seconds: float
) -> tuple[tuple[SourceFile, ...], int]:
    """The ready files of the days, and how many of those days are not ready yet."""
    wanted = set(days)
    files = [file for file in landed_files(landing) if day_of(file, landing) in wanted]
    ready = ready_files(files, now, settle_seconds)
    return tuple(ready), len(files) - len(ready)


class LandingCursor(BaseModel):
    """What the sensor remembers: a digest of each file that it has handed on, or seen once and not yet handed on."""

    taken: dict[str, str] = {}
    seen: dict[str, str] = {}

    def look(
        self, files: Sequence[SourceFile], now: float, settle_seconds: float
    ) -> tuple[list[SourceFile], LandingCursor]:
        """The files to ingest now, and what to remember.

        New and replaced files are taken when two looks found them the same and `settle_seconds` have passed since
        their modification. Files that are gone are forgotten, so a file that comes back is taken again.
        """
        identities = {file.uri: identity(file) for file in files}
        settled = {file.uri for file in ready_files(files, now, settle_seconds)}
        batch: list[SourceFile] = []
        taken: dict[str, str] = {}
        seen: dict[str, str] = {}
        for file in files:
            known, current = self.taken.get(file.uri), identities[file.uri]
            if known == current:
                taken[file.uri] = current
            elif file.uri in settled and self.seen.get(file.uri) == current:
                batch.append(file)
                taken[file.uri] = current
            else:
                seen[file.uri] = current
                if known is not None:
                    taken[file.uri] = known
        return batch, LandingCursor(taken=taken, seen=seen)


def identity(file: SourceFile) -> str:
    """A digest of a file's size and time of modification."""
    return hashlib.sha256(f"{file.bytes} {file.modified!r}".encode()).hexdigest()[:12]


def batches(files: Iterable[SourceFile], landing: str) -> Mapping[date, list[SourceFile]]:
    """The files by day, days in order."""
    by_day: dict[date, list[SourceFile]] = {}
    for file in files:
        by_day.setdefault(day_of(file, landing), []).append(file)
    return dict(sorted(by_day.items()))


def run_key(day: date, files: Iterable[SourceFile]) -> str:
    """Identifies a batch by its content: the same files are never ingested by two runs of the sensor."""
    text = "\n".join(sorted(f"{file.uri} {identity(file)}" for file in files))
    return f"{day}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
