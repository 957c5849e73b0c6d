"""Passes references between assets: as JSON files that never change, locally or on S3.

A file lies at `<root>/<asset>/<run>-<digest>.json`. The materialization that it belongs to names it in its metadata;
"latest" is a look-up in Dagster's event log, never a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
from dagster._core.execution.context.output import RUN_ID_PLACEHOLDER  # has no public name
from pydantic import BaseModel, Field, JsonValue, PrivateAttr, TypeAdapter, ValidationError

from step_scripts.runner import storage
from step_scripts.runner.contract import FrozenModel

# Metadata of a materialization: the URI of its reference file, and those of the files that its step has read.
REFERENCE, READ = "reference", "references_read"
# Earlier versions kept one file a day and one an asset, `<asset>.json`, which are not read any more.
_OWN = re.compile(r"[\w-]+-[0-9a-f]{16}\.json|\d{4}-\d\d-\d\d\.json")
_PAGE = 200


class StoredReference(FrozenModel):
    """The content of a reference file: `value` is what the asset returned, `read` the files of its inputs by asset."""

    asset: str
    partitions: tuple[str, ...] = ()
    run_id: str
    read: dict[str, str] = Field(default_factory=dict)
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


class ReferenceIOManager(dg.ConfigurableIOManager):
    """Keeps every reference in a file of its own.

    A step reads what its own run wrote, or the run that it continues; what neither has made is looked up as the latest
    materialization in the event log. So runs at the same time do not see each other's results. Only pydantic models
    are stored, so that nothing but data is ever read back.
    """

    root: str = Field(description="Folder or s3:// prefix of the reference files.")
    _read: dict[str, dict[str, str]] = PrivateAttr(default_factory=dict)  # by step: what it has read

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store `obj` atomically, and name the file in the metadata of the materialization.

        Raises `TypeError` for anything but a pydantic model.
        """
        name = context.asset_key.to_user_string()
        if not isinstance(obj, BaseModel):
            raise TypeError(f"asset {name} returned {type(obj).__name__}, not a reference")
        read = self._read.get(context.step_key, {})
        stored = StoredReference(
            asset=name,
            partitions=tuple(context.asset_partition_keys) if context.has_asset_partitions else (),
            run_id=context.run_id,
            read=read,
            value=obj.model_dump(mode="json"),
        )
        metadata: dict[str, Any] = {REFERENCE: dg.MetadataValue.path(stored.write(self.root))}
        context.add_output_metadata(metadata | ({READ: dg.MetadataValue.json(read)} if read else {}))

    def load_input(self, context: dg.InputContext) -> object:
        """The reference, validated against the type that the reader asks for.

        A run over several partitions reads one reference for all of them, which one run over the same partitions must
        have stored. Raises `dagster.Failure` if there is none.
        """
        name = context.asset_key.to_user_string()
        uri = self._file_to_read(context)
        try:
            stored = read_reference(uri)
            value = TypeAdapter(context.dagster_type.typing_type).validate_json(json.dumps(stored.value))
        except FileNotFoundError as error:
            raise _failure(f"{uri}, which the event log names as the reference of {name}, is gone", name) from error
        except ValidationError as error:
            raise _failure(f"{uri} was written by another version of the code ({error})", name) from error
        self._read.setdefault(context.step_context.step.key, {})[name] = uri
        return value

    def _file_to_read(self, context: dg.InputContext) -> str:
        key, instance = context.asset_key, context.instance
        name = key.to_user_string()
        if (run_id := _source_run(context)) is not None:
            if (uri := file_of_run(instance, run_id, key)) is None:
                raise _failure(f"{name} has no reference of run {run_id} in {event_log_name(instance)}", name)
            return uri
        uris = set[str]()
        for partition in _partitions_to_read(context) or [None]:
            if (uri := latest_file(instance, self.root, key, partition)) is None:
                which = f"partition {partition} of {name}" if partition else name
                known = event_log_name(instance)
                raise _failure(f"{which} has not been materialized below {self.root}, as far as {known} knows", name)
            uris.add(uri)
        first, *others = sorted(uris)
        if others:
            raise dg.Failure(
                f"{first} and {others[0]} are of several runs: partitions of {name} that were materialized in several "
                "runs cannot be read by one run over all of them. Include it in this run",
                allow_retries=False,
            )
        return first


def _source_run(context: dg.InputContext) -> str | None:
    """The run whose output this is: this one, or the one that it continues. `None`: neither makes the asset."""
    try:
        found = context.upstream_output.run_id if context.upstream_output else None
    except dg.DagsterInvariantViolationError:  # not recorded
        return None
    return None if found == RUN_ID_PLACEHOLDER else found


def _partitions_to_read(context: dg.InputContext) -> list[str]:
    """The partitions that a partitioned reader asks for; none for one that reads whatever was stored last."""
    step = context.step_context
    if not context.has_asset_partitions or step.entity_partitions_def is None:
        return []
    if not (step.has_partition_key or step.has_partition_key_range):
        raise dg.Failure(f"{step.step.key} is made by partition: choose some for this run", allow_retries=False)
    return list(context.asset_partition_keys)


def _failure(reason: str, asset: str) -> dg.Failure:
    return dg.Failure(
        f"{reason}. Materialize {asset} first, or in the same run; if it was materialized elsewhere, set DAGSTER_HOME "
        "to the folder that was used there",
        allow_retries=False,
    )
