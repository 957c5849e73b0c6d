"""Passes references between assets: as JSON files that never change, locally or on S3."""

from __future__ import annotations

import json
from typing import Any

import dagster as dg
from dagster._core.execution.context.output import RUN_ID_PLACEHOLDER  # has no public name
from pydantic import BaseModel, Field, PrivateAttr, TypeAdapter, ValidationError

from resources.references.files import (
    READ,
    REFERENCE,
    StoredReference,
    event_log_name,
    file_of_run,
    latest_file,
    read_reference,
)


class ReferenceIOManager(dg.ConfigurableIOManager):
    """Keeps every reference in a file of its own, see `resources.references.files`.

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
        partitions = _partitions_to_read(context) or [None]
        found = {partition: latest_file(instance, self.root, key, partition) for partition in partitions}
        missing = [partition for partition, uri in found.items() if uri is None]
        if missing:
            which = f"partition {missing[0]} of {name}" if missing[0] else name
            raise _failure(
                f"{which} has not been materialized below {self.root}, as far as {event_log_name(instance)} knows", name
            )
        uris = sorted({uri for uri in found.values() if uri is not None})
        if len(uris) > 1:
            raise dg.Failure(
                f"{uris[0]} and {uris[1]} are of several runs: partitions of {name} that were materialized in several "
                "runs cannot be read by one run over all of them. Include it in this run",
                allow_retries=False,
            )
        return uris[0]


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
