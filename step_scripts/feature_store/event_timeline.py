"""Which rows of a dataset are news to a feature group: incoming events against stored ones, by record.

The events of a record form a timeline, ordered by event time and then by commit. A row adds nothing if the timeline
says the same already: the event in force at the row's time, or the record's latest event, has the same content and is
stored. Ingesting the same rows twice therefore adds nothing the second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from step_scripts.table.hashes import Hash128, add_sums, event_hashes, hash_sums

_NO_SUMS = (0, 0)


@dataclass(frozen=True)
class Events:
    """Columns of events, one value each. `source` and `row` say where the event can be read.

    `commit`: what orders the commits that hold the events, their write times; of incoming events anything.
    """

    record: Hash128
    time: np.ndarray  # int64, microseconds since 1970, UTC
    content: Hash128
    source: np.ndarray
    row: np.ndarray
    commit: np.ndarray
    deleted: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def take(self, selection: np.ndarray) -> Events:
        """The selected events: by a mask or by positions."""
        return Events(
            (self.record[0][selection], self.record[1][selection]),
            self.time[selection],
            (self.content[0][selection], self.content[1][selection]),
            self.source[selection],
            self.row[selection],
            self.commit[selection],
            self.deleted[selection],
        )

    def sums(self, *, with_deleted: bool) -> tuple[int, int]:
        """Digest of these events."""
        if not len(self):
            return _NO_SUMS
        deleted = self.deleted if with_deleted else None
        return hash_sums(event_hashes(self.record, self.time, self.content, deleted))


def joined(parts: list[Events]) -> Events:
    """All events of `parts`, which are not empty, in order."""
    if len(parts) == 1:
        return parts[0]
    return Events(
        (np.concatenate([p.record[0] for p in parts]), np.concatenate([p.record[1] for p in parts])),
        np.concatenate([p.time for p in parts]),
        (np.concatenate([p.content[0] for p in parts]), np.concatenate([p.content[1] for p in parts])),
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("source", "row", "commit", "deleted")),
    )


@dataclass(frozen=True)
class Changes:
    """What a set of incoming events changes.

    `stored`: the events to store, tombstones included; `latest`: whether each is its record's latest from then on.
    `live_added` and `live_removed`: digests of the live events that come and go. `outdated`: rows that are not the
    record's latest state. `conflicts`: rows that contradict another row of the dataset: same record, same event time,
    other content; if there are any, nothing else is filled in.
    """

    stored: list[Events] = field(default_factory=list)
    latest: list[np.ndarray] = field(default_factory=list)
    added: int = 0
    unchanged: int = 0
    superseded: int = 0
    deleted: int = 0
    outdated: int = 0
    live_rows: int = 0
    live_added: tuple[int, int] = _NO_SUMS
    live_removed: tuple[int, int] = _NO_SUMS
    deduplicate: bool = False
    conflicts: list[Events] = field(default_factory=list)

    def merge(self, other: Changes) -> Changes:
        """Both, of different records."""
        return Changes(
            self.stored + other.stored,
            self.latest + other.latest,
            self.added + other.added,
            self.unchanged + other.unchanged,
            self.superseded + other.superseded,
            self.deleted + other.deleted,
            self.outdated + other.outdated,
            self.live_rows + other.live_rows,
            add_sums(self.live_added, other.live_added),
            add_sums(self.live_removed, other.live_removed),
            self.deduplicate or other.deduplicate,
            self.conflicts + other.conflicts,
        )


def changes(incoming: Events, stored: Events, mirror_time: int | None) -> Changes:
    """What `incoming` changes, where `stored` holds all events of the same records.

    With `mirror_time` (microseconds), `stored` holds the whole group, whose live records become those of `incoming`:
    others are deleted at that time, or just after their latest event if that is later; a record's latest row counts
    even if it is older than what is stored, and is then stored as of just after that.
    """
    conflicts = _conflicts(incoming)
    if conflicts is not None:
        return Changes(conflicts=[conflicts])
    several_incoming, several_stored = _with_several_events(incoming, stored)
    if several_incoming is None or several_stored is None:
        return _single_changes(incoming, stored, mirror_time)
    single = _single_changes(incoming.take(~several_incoming), stored.take(~several_stored), mirror_time)
    return single.merge(_timeline_changes(incoming.take(several_incoming), stored.take(several_stored), mirror_time))


def _conflicts(incoming: Events) -> Events | None:
    """Incoming events that contradict another one: same record and event time, other content."""
    ids = pl.Series(incoming.record[0])
    if ids.n_unique() == len(ids):
        return None
    several = incoming.take(ids.is_duplicated().to_numpy())
    line = several.take(_sorted(several.record[0], several.record[1], several.time))
    contradicts = ~_differs(*line.record, line.time) & _differs(*line.content)
    return line.take(contradicts) if contradicts.any() else None


def _with_several_events(incoming: Events, stored: Events) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Masks of the events whose record has several incoming or several stored events, or a tombstone."""
    ids_in, ids_stored = pl.Series(incoming.record[0]), pl.Series(stored.record[0])
    if ids_in.n_unique() == len(ids_in) and ids_stored.n_unique() == len(ids_stored) and not stored.deleted.any():
        return None, None
    several = pl.concat(
        [
            ids_in.filter(ids_in.is_duplicated()),
            ids_stored.filter(ids_stored.is_duplicated() | pl.Series(stored.deleted)),
        ]
    ).unique()
    return ids_in.is_in(several.implode()).to_numpy(), ids_stored.is_in(several.implode()).to_numpy()


def _single_changes(incoming: Events, stored: Events, mirror_time: int | None) -> Changes:
    """Where each record has at most one event on either side, and no tombstone."""
    position = _positions(incoming, stored)
    known = position >= 0
    found = stored.take(position[known])
    same = np.zeros(len(incoming), bool)
    same[known] = ~_unequal(found.content, incoming.take(known).content)
    later = np.zeros(len(incoming), bool)
    later[known] = incoming.time[known] >= found.time
    if mirror_time is not None and not (later | same)[known].all():
        time = incoming.time.copy()
        time[known] = np.where(later[known] | same[known], time[known], found.time + 1)
        incoming, later = replace(incoming, time=time), known
    replaces = known & ~same & later
    news = incoming.take(~same)
    result = Changes(
        stored=[news],
        latest=[(~known | replaces)[~same]],
        added=int((~known).sum() + (known & ~same & ~later).sum()),
        unchanged=int(same.sum()),
        superseded=int(replaces.sum()),
        outdated=int((known & ~same & ~later).sum()),
        live_rows=int((~known).sum()),
        live_added=incoming.take(~known | replaces).sums(with_deleted=False),
        live_removed=stored.take(position[replaces]).sums(with_deleted=False),
        deduplicate=bool((known & ~same).any()),
    )
    if mirror_time is None:
        return result
    absent = np.ones(len(stored), bool)
    absent[position[known]] = False
    return result.merge(_deletions(stored.take(absent), mirror_time))


def _positions(incoming: Events, stored: Events) -> np.ndarray:
    """Where in `stored` each incoming event's record is; -1: nowhere. Records occur once in `stored`."""
    if not len(stored):
        return np.full(len(incoming), -1)
    left = pl.DataFrame({"a": incoming.record[0]})
    right = pl.DataFrame({"a": stored.record[0], "at": np.arange(len(stored))})
    keys = ["a"]
    if right["a"].n_unique() < right.height:  # the first half of the hash is as good as all of it, but for luck
        left, right, keys = left.with_columns(b=incoming.record[1]), right.with_columns(b=stored.record[1]), ["a", "b"]
    position = left.join(right, on=keys, how="left", maintain_order="left")["at"].fill_null(-1).to_numpy()
    same = stored.record[1][position] == incoming.record[1]
    return np.where(same, position, -1)


def _deletions(latest: Events, mirror_time: int) -> Changes:
    """Deletion of live records, given their latest events."""
    if not len(latest):
        return Changes()
    nothing = np.zeros(len(latest), np.uint64)
    tombstones = replace(
        latest,
        time=np.maximum(latest.time + 1, mirror_time),
        content=(nothing, nothing),
        deleted=np.ones(len(latest), bool),
    )
    return Changes(
        stored=[tombstones],
        latest=[np.ones(len(latest), bool)],
        deleted=len(latest),
        live_rows=-len(latest),
        live_removed=latest.sums(with_deleted=False),
        deduplicate=True,
    )


def _timeline_changes(incoming: Events, stored: Events, mirror_time: int | None) -> Changes:
    """The general case."""
    if not len(incoming) and not len(stored):
        return Changes()
    incoming = replace(incoming, commit=np.full(len(incoming), np.iinfo(np.int64).max))
    if mirror_time is not None and len(incoming) and len(stored):
        incoming = _after_stored(incoming, stored)
    both = joined([stored, incoming])
    positions = _sorted(*both.record, both.time, both.commit)
    is_new = positions >= len(stored)
    line = both.take(positions)

    starts = _differs(*line.record)
    same_event = ~starts & ~_differs(line.time, *line.content) & is_new & _shifted(is_new)
    run_starts = starts | _differs(line.deleted, *line.content)
    old_before = np.cumsum(~is_new) - _at_start(np.cumsum(~is_new) - ~is_new, run_starts)
    record = np.cumsum(starts) - 1
    ends = np.flatnonzero(np.append(starts[1:], True))
    last = ends[record]  # position of the last event of the same record
    as_latest = (line.content[0] == line.content[0][last]) & (line.content[1] == line.content[1][last])
    as_latest &= ~line.deleted[last]
    redundant = is_new & ((old_before > 0) | same_event | (as_latest & (old_before[last] > 0)))
    kept = ~redundant

    places = np.arange(len(line))
    old_last = np.maximum.reduceat(np.where(is_new, -1, places), np.flatnonzero(starts))
    new_last = np.maximum.reduceat(np.where(kept, places, -1), np.flatnonzero(starts))
    old_live = (old_last >= 0) & ~line.deleted[old_last]
    new_live = ~line.deleted[new_last]
    changed = old_last != new_last
    superseded = old_live & changed
    rows = int(is_new.sum())
    news = is_new & kept
    events_kept = np.add.reduceat(kept.astype(np.int64), np.flatnonzero(starts))
    current = as_latest & new_live[record]
    result = Changes(
        stored=[line.take(news)],
        latest=[(places == new_last[record])[news]],
        added=int(news.sum() - superseded.sum()),
        unchanged=rows - int(news.sum()),
        superseded=int(superseded.sum()),
        outdated=int((is_new & ~current).sum()),
        live_rows=int(new_live.sum()) - int(old_live.sum()),
        live_added=line.take(new_last[changed & new_live]).sums(with_deleted=False),
        live_removed=line.take(old_last[superseded]).sums(with_deleted=False),
        deduplicate=bool((events_kept > 1).any()),
    )
    if mirror_time is None:
        return result
    absent = old_live & ~np.maximum.reduceat(is_new, np.flatnonzero(starts))
    return result.merge(_deletions(line.take(old_last[absent]), mirror_time))


def _after_stored(incoming: Events, stored: Events) -> Events:
    """`incoming` with each record's latest event no earlier than the record's latest stored one, if they differ."""
    new, old = _latest(incoming), _latest(stored)
    position = _positions(new[0], old[0])
    known = position >= 0
    latest, places = old[0].take(position[known]), new[1][known]
    changed = latest.deleted | _unequal(latest.content, new[0].take(known).content)
    behind = changed & (latest.time > incoming.time[places])
    time = incoming.time.copy()
    time[places[behind]] = latest.time[behind] + 1
    return replace(incoming, time=time)


def _latest(events: Events) -> tuple[Events, np.ndarray]:
    """The latest event of each record, and their positions."""
    order = _sorted(*events.record, events.time, events.commit)
    line = events.take(order)
    ends = np.append(_differs(*line.record)[1:], True)
    return line.take(ends), order[ends]


def _unequal(left: Hash128, right: Hash128) -> np.ndarray:
    return (left[0] != right[0]) | (left[1] != right[1])


def _sorted(*keys: np.ndarray) -> np.ndarray:
    """Positions that sort by these keys, the first one being the most significant; equal rows keep their order."""
    frame = pl.DataFrame({str(n): key for n, key in enumerate(keys)})
    return frame.select(pl.arg_sort_by(frame.columns, maintain_order=True)).to_series().to_numpy().astype(np.int64)


def _differs(*columns: np.ndarray) -> np.ndarray:
    """Whether a row differs from the one before it; the first one does."""
    result = np.zeros(len(columns[0]), bool)
    result[0] = True
    for column in columns:
        result[1:] |= column[1:] != column[:-1]
    return result


def _shifted(flags: np.ndarray) -> np.ndarray:
    """The flag of the row before; False for the first."""
    return np.concatenate([[False], flags[:-1]])


def _at_start(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each row, the value at the start of its run."""
    return values[np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))]
