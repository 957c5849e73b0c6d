"""Which rows of a dataset are news to a feature group, and their events: incoming against stored ones, by record.

The events of a record form a timeline, ordered by event time and then by commit. A row adds nothing if the timeline
says the same already: the event in force at the row's time, or the record's latest event, has the same content and is
stored. Ingesting the same rows twice therefore adds nothing the second time.

Records are divided into partitions by the hash of their id. The hashes of events meet in files by partition, and the
places of the rows to store go to files by source, so that memory depends on the size of a partition and not of the
group. Every function can be repeated: it overwrites what an earlier attempt has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import polars as pl

from step_scripts.feature_store.commits import Changes
from step_scripts.feature_store.events import (
    BY_RECORD,
    Source,
    WriteTarget,
    content_columns,
    read_source,
    row_types,
    tombstones,
    write_events,
)
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted
from step_scripts.table import hashes
from step_scripts.table.column_types import TIMESTAMP
from step_scripts.table.spec import TableSpec

_DAY = 24 * 3_600_000_000  # microseconds
_PARTITION_EVENTS = 1 << 20
_MOST_PARTITIONS = 1 << 12
SHOWN = 20  # record ids in a message
_INCOMING, _STORED = "incoming", "stored"  # folders of hashed events
_SELECTED = "selected"  # folder of the places of rows to store
_RECORD, _CONTENT = ("record_hi", "record_lo"), ("content_hi", "content_lo")
_LATEST = 2**63 - 1
# Hashes of record id and content, when the event happened and was committed, and where it can be read.
_EVENTS: dict[str, pl.DataType] = {
    **dict.fromkeys(_RECORD, pl.UInt64()),
    "time": pl.Int64(),  # microseconds since 1970, UTC
    **dict.fromkeys(_CONTENT, pl.UInt64()),
    "is_deleted": pl.Boolean(),
    "commit": pl.Int64(),  # the write time
    "source": pl.UInt32(),
    "row": pl.UInt32(),
}
_PLACES = ("source", "row", "time", "is_latest")


@dataclass(frozen=True)
class WriteItem:
    """`rows` events to write: those that the comparison in `folder` has selected of each source, from a day to another.

    Days are counted from 1970.
    """

    sources: tuple[tuple[Source, int, int], ...]
    folder: str
    rows: int


def partition_count(events: int) -> int:
    """Number of partitions for so many events to compare."""
    return min(max(1, -(-events // _PARTITION_EVENTS)), _MOST_PARTITIONS)


def hash_source(source: Source, table: TableSpec, partitions: int, folder: str, known_only: bool) -> int | None:
    """Hash the events of `source` into files by partition. Returns their latest event time; None without events.

    `known_only`: only events of records that the dataset has, too; its sources have been hashed before. Raises
    `StepError` if the source lacks a column, has one of another type, or has empty record ids or event times.
    """
    names = content_columns(table)
    flags = ["is_deleted", "write_time"] if source.stored is not None else []
    rows = read_source(source, ["record_id", "event_time", *names, *flags], table)
    for name in ("record_id", "event_time"):
        if empty := rows[name].null_count():
            held = counted(source.rows, "row")
            raise StepError(f"{source.uris[0]}: {empty:,} of {held} without {name}. {source.remedy}")
    record = hashes.text_hashes(rows["record_id"])
    events = rows.select(
        pl.Series("record_hi", record[0]),
        pl.Series("record_lo", record[1]),
        pl.col("event_time").to_physical().alias("time"),
        pl.lit(source.index, pl.UInt32).alias("source"),
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
    )
    if known_only:
        known = pl.concat(_read_events(folder, _INCOMING, n)["record_hi"] for n in range(partitions))
        events = events.filter(pl.col("record_hi").is_in(known.implode()))
        rows = rows[events["row"]]
    content = hashes.content_hashes(rows, names)
    events = events.with_columns(
        pl.Series("content_hi", content[0]),
        pl.Series("content_lo", content[1]),
        (rows["is_deleted"] if flags else pl.lit(False)).alias("is_deleted"),
        (rows["write_time"].to_physical() if flags else pl.lit(_LATEST)).alias("commit"),
    ).select(*_EVENTS)
    kind = _INCOMING if source.stored is None else _STORED
    number = hashes.partition_of(events["record_hi"].to_numpy(), partitions)
    hashes.write_partitions(events, number, partitions, storage.join(folder, kind, f"{source.index:06d}.arrow"))
    return cast("int | None", events["time"].max())


def compare_partition(number: int, sources: int, folder: str, mirror_time: int | None) -> tuple[Changes, pl.DataFrame]:
    """Compare the events of one partition, of that many sources, which have been hashed to `folder`.

    Writes which rows are to be stored, for `item_events`, and returns how many they are by source and day.
    """
    found, news = changes(_read_events(folder, _INCOMING, number), _read_events(folder, _STORED, number), mirror_time)
    if news.height:
        uri = storage.join(folder, _SELECTED, f"{number:06d}.arrow")
        hashes.write_partitions(news, news["source"].cast(pl.Int64).to_numpy(), sources, uri)
    return found, news.group_by("source", day=pl.col("time") // _DAY).len("rows")


def item_events(item: WriteItem, table: TableSpec) -> pl.DataFrame:
    """The events of `item`: record_id, event_time, the table's columns, is_deleted, is_latest."""
    selected, frames = storage.list_files(storage.join(item.folder, _SELECTED)), []
    for source, first_day, last_day in item.sources:
        rows = pl.concat(hashes.read_partition(selected, source.index))
        rows = rows.filter((pl.col("time") // _DAY).is_between(first_day, last_day))
        time = rows["time"].cast(TIMESTAMP).alias("event_time")  # may have been moved behind what is stored
        if source.stored is not None:
            ids = read_source(source, ["record_id"], table)[rows["row"]]
            events = tombstones(ids["record_id"], time, table)
        else:
            events = read_source(source, list(row_types(table)), table)[rows["row"]]
            events = events.with_columns(time, is_deleted=False)
        frames.append(events.with_columns(rows["is_latest"]))
    return pl.concat(frames).rechunk()


def write_files(item: WriteItem, target: WriteTarget) -> list[str]:
    """Write the files of `item`, one a day; their paths relative to `target.data_uri`."""
    events = item_events(item, target.table).with_columns(pl.col("event_time").dt.date().alias("_day"))
    days = events.sort(*BY_RECORD).partition_by("_day", maintain_order=False, include_key=False)
    return [write_events(day, target) for day in days]


def divided(counts: Sequence[tuple[int, int, int]], most_rows: int) -> Iterator[tuple[dict[int, tuple[int, int]], int]]:
    """Divide rows, counted as (day, source, rows) and sorted, into pieces: first and last day by source, and rows.

    A piece has at most `most_rows` rows or is one day of one source. A day is divided only if it has more rows than
    that, so that there are as few files as the layout allows.
    """
    days: dict[int, tuple[int, int]] = {}
    held = 0
    for day, of_day in groupby(counts, key=lambda count: count[0]):
        sources = [(source, rows) for _, source, rows in of_day]
        whole = sum(rows for _, rows in sources) <= most_rows
        for part in [sources] if whole else [[one] for one in sources]:
            rows = sum(count for _, count in part)
            if days and held + rows > most_rows:
                yield days, held
                days, held = {}, 0
            held += rows
            for source, _ in part:
                days[source] = (days[source][0] if source in days else day, day)
    if days:
        yield days, held


def changes(incoming: pl.DataFrame, stored: pl.DataFrame, mirror_time: int | None) -> tuple[Changes, pl.DataFrame]:
    """What `incoming` changes, where `stored` holds all events of the same records; and the events to store.

    Those have columns `source`, `row`, `time` and `is_latest`. With `mirror_time` (microseconds), `stored` holds the
    whole group, whose live records become those of `incoming`: others are deleted at that time, or just after their
    latest event if that is later; a record's latest row counts even if it is older than what is stored, and is then
    stored as of just after that.
    """
    if mirror_time is not None:
        incoming = _moved_behind(incoming, stored)
    line = _timelines(incoming, stored)
    if line["is_conflict"].any():
        places = line.filter("is_conflict").select("source", "row").head(SHOWN).rows()
        return Changes(conflicts=tuple(places)), line.clear().select(_PLACES)
    records = line.filter("is_last")
    was_live = (records["before"] >= 0) & ~line["is_deleted"].gather(records["before"].clip(0))
    is_live = ~line["is_deleted"].gather(records["after"])
    changed = records["before"] != records["after"]
    news = line.filter("is_new", "kept")
    superseded = records.filter(was_live & changed)
    found = Changes(
        added=news.height - superseded.height,
        unchanged=incoming.height - news.height,
        superseded=superseded.height,
        outdated=line.select((pl.col("is_new") & ~pl.col("as_latest")).sum()).item(),
        latest=int(news["is_latest"].sum()),
        live_rows=int(is_live.sum()) - int(was_live.sum()),
        stored_sums=_sums(news),
        live_added=_sums(line[records.filter(changed & is_live)["after"]]),
        live_removed=_sums(line[superseded["before"]]),
        further_events=int(line["kept"].sum()) - records.height,
    )
    if mirror_time is None:
        return found, news.select(_PLACES)
    absent = line[records.filter(was_live & ~records["in_dataset"])["before"]]
    stones = absent.with_columns(
        pl.max_horizontal(pl.col("time") + 1, mirror_time).alias("time"),
        *(pl.lit(0, pl.UInt64).alias(name) for name in _CONTENT),
        pl.lit(True).alias("is_deleted"),
        pl.lit(True).alias("is_latest"),
    )
    found += Changes(
        deleted=stones.height,
        latest=stones.height,
        live_rows=-stones.height,
        stored_sums=_sums(stones),
        live_removed=_sums(absent),
        further_events=stones.height,
    )
    return found, pl.concat([news.select(_PLACES), stones.select(_PLACES)])


def _moved_behind(incoming: pl.DataFrame, stored: pl.DataFrame) -> pl.DataFrame:
    """`incoming` with each record's latest event no earlier than the record's latest stored one, if they differ."""
    last_stored, first_incoming = stored.select(pl.max("time")).item(), incoming.select(pl.min("time")).item()
    if last_stored is None or first_incoming is None or last_stored <= first_incoming:
        return incoming
    latest = stored.sort("time", "commit").unique(_RECORD, keep="last")
    latest = latest.select(*_RECORD, pl.col("time", *_CONTENT, "is_deleted").name.suffix("_stored"))
    differs = pl.any_horizontal("is_deleted_stored", *(pl.col(name) != pl.col(f"{name}_stored") for name in _CONTENT))
    joined = incoming.join(latest, on=_RECORD, how="left", maintain_order="left")
    behind = differs & (pl.col("time") < pl.col("time_stored"))
    if not joined.select(behind.any()).item():
        return incoming
    is_last = pl.col("time") == pl.col("time").max().over(_RECORD)
    time = pl.when(behind & is_last).then(pl.col("time_stored") + 1).otherwise("time")
    return joined.with_columns(time.alias("time")).select(*_EVENTS)


def _timelines(incoming: pl.DataFrame, stored: pl.DataFrame) -> pl.DataFrame:
    """All events in order of their records' timelines, and what is to become of them, in added columns.

    `is_new`: incoming. `is_conflict`: contradicts the incoming event before it. `as_latest`: has the content of the
    record's latest event. `kept`: stored, already or from now on. `is_latest`: the record's last kept one. `is_last`:
    the last one of its record, which also has `in_dataset`, whether any is incoming, and the positions of the record's
    latest event `before` (-1 without any) and `after`.
    """
    both = pl.concat([stored.with_columns(is_new=pl.lit(False)), incoming.with_columns(is_new=pl.lit(True))])
    is_new = pl.col("is_new")

    def as_before(*columns: str) -> pl.Expr:
        same = (pl.col(name) == pl.col(name).shift() for name in columns)
        return pl.all_horizontal(*same).fill_null(False)

    def of_last(expression: pl.Expr) -> pl.Expr:
        """The value at the last event of the same record."""
        return pl.when("is_last").then(expression).backward_fill()

    def so_far(first: pl.Expr, condition: pl.Expr, value: pl.Expr, otherwise: Any) -> pl.Expr:
        """The value at the latest event with the condition, since the one where `first` is true."""
        return pl.when(condition).then(value).when(first).then(pl.lit(otherwise)).forward_fill()

    line = both.sort(*_RECORD, "time", "commit", maintain_order=True).with_columns(
        at=pl.int_range(pl.len(), dtype=pl.Int64),
        starts=~as_before(*_RECORD),
        starts_run=~as_before(*_RECORD, *_CONTENT, "is_deleted"),  # of events that say the same
        is_again=as_before(*_RECORD, "time", "is_new") & is_new,
    )
    line = line.with_columns(
        is_last=pl.col("starts").shift(-1, fill_value=True),
        # Whether the event, or one before it in its run, is stored already.
        is_known=so_far(pl.col("starts_run"), ~is_new, pl.lit(True), False),
        is_conflict=pl.col("is_again") & pl.col("starts_run"),
        in_dataset=so_far(pl.col("starts"), is_new, pl.lit(True), False),
        before=so_far(pl.col("starts"), ~is_new, pl.col("at"), -1),
    )
    as_latest = pl.all_horizontal(
        *(pl.col(name) == of_last(pl.col(name)) for name in _CONTENT), ~of_last(pl.col("is_deleted"))
    )
    line = line.with_columns(as_latest=as_latest).with_columns(
        kept=~(is_new & (pl.col("is_known") | pl.col("is_again") | pl.col("as_latest") & of_last(pl.col("is_known"))))
    )
    line = line.with_columns(after=so_far(pl.col("starts"), pl.col("kept"), pl.col("at"), -1))
    return line.with_columns(is_latest=pl.col("at") == of_last(pl.col("after")))


def _sums(events: pl.DataFrame) -> tuple[int, int]:
    """Digest of events."""
    record, content = (events.select(halves).to_numpy().T for halves in (_RECORD, _CONTENT))
    times, deleted = events["time"].to_numpy(), events["is_deleted"].to_numpy()
    return hashes.hash_sums(hashes.event_hashes(record, times, content, deleted))


def _read_events(folder: str, kind: str, number: int) -> pl.DataFrame:
    """Hashed events of a partition, incoming or stored ones, in the order of their sources."""
    uris = storage.list_files(storage.join(folder, kind))
    return pl.concat([pl.DataFrame(schema=_EVENTS), *hashes.read_partition(uris, number)])
