"""Which reference files may go: those that no reader can come upon any more."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg
from pydantic import ValidationError

from resources.references.files import (
    StoredReference,
    asset_folder,
    materializations,
    read_reference,
    reference_files,
)


@dataclass
class ReferencesFound:
    """What the reference files below a root say, by URI.

    `current`: those that a step may read. `waiting`: those that only their own run, or one that continues it, may read.
    `surplus`: those that may go. `latest_runs`: the runs that made the assets' latest versions, below this root or
    another one; without their events nobody would find the references.
    """

    current: dict[str, StoredReference] = field(default_factory=dict)
    waiting: dict[str, StoredReference] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)
    latest_runs: set[str] = field(default_factory=set)


def find_references(
    instance: dg.DagsterInstance,
    root: str,
    assets: Sequence[dg.AssetKey],
    *,
    before: datetime,
    forgotten: datetime,
    busy: Collection[str] = (),
) -> ReferencesFound:
    """Look through the reference files of these assets.

    Current are those that the event log names as the latest of an asset or a partition, and those of which it knows
    nothing newer: they may stand in another event log. The others go if they were written `before` that time, unless
    their run is `busy`. Older than `forgotten` the log does not know partitions, because it has lost their runs: those
    go too. Raises `ValueError` naming the latest reference of an asset if it cannot be read.
    """
    found = ReferencesFound()
    for key, files in reference_files(root, assets).items():
        latest: dict[str | None, tuple[str, float]] = {}
        folders: set[str] = set()
        folder = asset_folder(root, key)
        for record, uri in materializations(instance, key):
            place = uri.rpartition("/")[0]
            if place not in folders:
                folders.add(place)
                found.latest_runs.add(record.run_id)
            if place == folder:
                latest.setdefault(record.partition_key, (uri, record.timestamp))
        named = {uri for uri, _ in latest.values()}
        newest = max((time for _, time in latest.values()), default=0.0)
        for uri, modified in files.items():
            try:
                stored = read_reference(uri)
            except ValidationError as error:  # damaged, or of another version of the code: no step can read it
                if uri in named:
                    asset = key.to_user_string()
                    raise ValueError(f"{uri} is damaged ({error}): materialize {asset} again, or remove it") from error
                found.surplus += [uri] if modified < before.timestamp() else []
                continue
            partitions = stored.partitions or (None,)
            superseded = all(p in latest and latest[p][1] > modified for p in partitions)
            lost = modified < min(newest, forgotten.timestamp())
            if uri in named or not (superseded or lost):
                found.current[uri] = stored
            elif modified < before.timestamp() and stored.run_id not in busy:
                found.surplus.append(uri)
            else:
                found.waiting[uri] = stored
    return found


def uris_in(references: Iterable[StoredReference]) -> set[str]:
    """All URIs in the values of references: what lies there is in use."""
    values = nested([stored.value for stored in references])
    return {value["uri"] for value in values if isinstance(value, dict) and isinstance(value.get("uri"), str)}


def nested(value: Any) -> Iterator[Any]:
    """A JSON value, and all values in it."""
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(item)
