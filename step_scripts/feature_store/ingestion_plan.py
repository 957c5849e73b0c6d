"""The pieces of an ingestion: what they are, and how the work is divided into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from step_scripts.feature_store.event_sources import Source
from step_scripts.table.spec import TableSpec

_PIECE_ROWS = (1 << 17, 1 << 20)  # fewest and most rows of a piece: a worker holds one piece, about 0.4 kB a row
BUCKET_EVENTS = 1 << 19
_MOST_BUCKETS = 1 << 12
HASH_LANES = 8  # of a scratch file: record id 2, time, content 2, row, write time, deleted
SELECTION_LANES = 3  # row, time, latest
ATTEMPT_CHARACTERS = 6


@dataclass(frozen=True)
class Hashed:
    """Where the hashes of one source are, and in it the start of each bucket (and the end of the last)."""

    path: str
    starts: tuple[int, ...]
    first_time: int | None
    last_time: int | None


@dataclass(frozen=True)
class Selection:
    """Rows of one source that are to be stored, in the scratch file of one bucket.

    Its lanes: row in the source, event time, whether it is the record's latest event.
    """

    source: int
    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class WriteItem:
    """Files to write: those of the days `first_day` to `last_day`, from the rows selected of these sources.

    A source without selections is stored as a whole: its records are new, and occur once.
    """

    number: int
    first_day: int
    last_day: int
    sources: tuple[tuple[Source, tuple[Selection, ...]], ...]


@dataclass(frozen=True)
class WriteTarget:
    """Where the files go, their columns, the time of writing, and with what their names begin.

    `ingestion`: `ATTEMPT_CHARACTERS` characters that no other ingestion has. `schema`, `partition`: see
    `step_scripts.feature_store.group.Writing`.
    """

    data: str
    table: TableSpec
    write_time: datetime
    ingestion: str
    schema: pa.Schema
    partition: str


def piece_rows(rows: int, workers: int) -> int:
    """Rows of a piece, so that all workers have one and none has too much to hold."""
    low, high = _PIECE_ROWS
    return max(low, min(high, -(-rows // workers)))


def bucket_count(events: int) -> int:
    """Number of buckets, a power of two, for so many events to compare."""
    buckets = 1
    while buckets < _MOST_BUCKETS and buckets * BUCKET_EVENTS < events:
        buckets *= 2
    return buckets


def write_groups(histogram: Sequence[tuple[int, int, int]], most_rows: int) -> list[tuple[int, int, list[int], int]]:
    """Divide rows, counted as (source, day, rows), into pieces of work: (first day, last day, sources, rows).

    A piece has at most `most_rows` rows or is one day of one source. A day is divided only if it has more rows than
    that, so that there are as few files as the layout allows.
    """
    by_day: dict[int, list[tuple[int, int]]] = {}
    for (source, day), rows in _added_up(histogram).items():
        by_day.setdefault(day, []).append((source, rows))
    groups: list[tuple[int, int, list[int], int]] = []
    days: list[int] = []
    sources: set[int] = set()
    held = 0

    def finish() -> None:
        nonlocal held
        if days:
            groups.append((days[0], days[-1], sorted(sources), held))
        days.clear()
        sources.clear()
        held = 0

    for day, counts in sorted(by_day.items()):
        total = sum(rows for _, rows in counts)
        if held + total > most_rows:
            finish()
        if total <= most_rows:
            days.append(day)
            sources.update(source for source, _ in counts)
            held += total
            continue
        for source, rows in sorted(counts):
            if held + rows > most_rows:
                finish()
            days[:] = [day]
            sources.add(source)
            held += rows
        finish()
    finish()
    return groups


def _added_up(histogram: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for source, day, rows in histogram:
        counts[source, day] = counts.get((source, day), 0) + rows
    return counts
