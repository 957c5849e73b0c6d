"""Reference files, and the event log that says which of them is an asset's latest.

A file lies at `<root>/<asset>/<run>-<digest>.json` and never changes. The materialization that it belongs to names it
in its metadata; "latest" is a look-up in the event log, never a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence

import dagster as dg
from pydantic import BaseModel, ConfigDict, JsonValue

from step_scripts.runner import storage

# Metadata of a materialization: the URI of its reference file, and those of the files that its step has read.
REFERENCE, READ = "reference", "references_read"
# Earlier versions kept one file a day and one an asset, `<asset>.json`, which are not read any more.
_OWN = re.compile(r"[\w-]+-[0-9a-f]{16}\.json|\d{4}-\d\d-\d\d\.json")
_PAGE = 200


class StoredReference(BaseModel):
    """The content of a reference file: `value` is what the asset returned, `read` the files of its inputs by asset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: str
    partitions: tuple[str, ...] = ()
    run_id: str
    read: dict[str, str] = {}
    value: JsonValue

    def write(self, root: str) -> str:
        """Store it below `root`, atomically; returns the URI."""
        data = self.model_dump_json(indent=2).encode()
        folder = asset_folder(root, dg.AssetKey.from_user_string(self.asset))
        uri = storage.join(folder, f"{self.run_id}-{hashlib.sha256(data).hexdigest()[:16]}.json")
        storage.write_bytes(uri, data)
        return uri


def asset_folder(root: str, key: dg.AssetKey) -> str:
    """Where the reference files of an asset are."""
    return storage.join(root, *key.path)


def reference_files(root: str, assets: Sequence[dg.AssetKey]) -> dict[dg.AssetKey, dict[str, tuple[int, float]]]:
    """URIs of the reference files of each asset; of each: bytes, and when it was written in seconds since 1970."""
    found: dict[dg.AssetKey, dict[str, tuple[int, float]]] = {key: {} for key in assets}
    folders = {"/".join(key.path): key for key in assets}
    for path, size, modified in storage.list_details(root):
        folder, _, name = path.rpartition("/")
        key = folders.get(folder) if _OWN.fullmatch(name) else folders.get(path.removesuffix(".json"))
        if key is not None:
            found[key][storage.join(root, path)] = size, modified
    return found


def materializations(
    instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None = None
) -> Iterator[tuple[dg.EventLogRecord, str]]:
    """Records of the asset's materializations with their reference files, the latest first.

    Of all roots: environments may share an event log. Materializations that people have reported by hand have no file.
    `partition`: of this partition only.
    """
    wanted = dg.AssetRecordsFilter(key, asset_partitions=None if partition is None else [partition])
    cursor = None
    while True:
        page = instance.fetch_materializations(wanted, limit=_PAGE, cursor=cursor)
        for record in page.records:
            if (uri := named_file(record.asset_materialization)) is not None:
                yield record, uri
        if not page.has_more:
            return
        cursor = page.cursor


def latest_file(instance: dg.DagsterInstance, root: str, key: dg.AssetKey, partition: str | None = None) -> str | None:
    """The file below `root` of the asset's latest materialization, or of a partition's; `None` without one."""
    folder = asset_folder(root, key) + "/"
    return next((uri for _, uri in materializations(instance, key, partition) if uri.startswith(folder)), None)


def file_of_run(instance: dg.DagsterInstance, run_id: str, key: dg.AssetKey) -> str | None:
    """The reference file that the run has written last for the asset; `None` without one."""
    found = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION, ascending=False
    ).records
    own = (record.asset_materialization for record in found)
    return next((uri for m in own if m and m.asset_key == key and (uri := named_file(m))), None)


def named_file(materialization: dg.AssetMaterialization | None) -> str | None:
    """The reference file that a materialization names."""
    found = materialization.metadata.get(REFERENCE) if materialization else None
    return str(found.value) if found else None


def read_reference(uri: str) -> StoredReference:
    """The content of a reference file. Raises `FileNotFoundError`, `pydantic.ValidationError`."""
    return StoredReference.model_validate_json(storage.read_bytes(uri))


def event_log_name(instance: dg.DagsterInstance) -> str:
    """Which event log this is, for people who wonder why it does not know something."""
    home = os.environ.get("DAGSTER_HOME")
    if home:
        return f"the event log of DAGSTER_HOME={home}"
    place = "in memory" if instance.is_ephemeral else "a temporary one"
    return f"the event log of this process ({place}, because DAGSTER_HOME is not set)"
