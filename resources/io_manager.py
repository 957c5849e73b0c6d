"""Stores references between assets as JSON files, locally or on S3."""

import dagster as dg
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from step_scripts import storage


class ReferenceIOManager(dg.ConfigurableIOManager):
    """Keeps the latest reference of every asset at `<root>/<asset>.json`.

    Of a partitioned asset also that of every partition, at `<root>/<asset>/<partition>.json`; an asset without
    partitions that reads it gets the reference that was stored last. Only pydantic models are stored, so that nothing
    but data is ever read back.
    """

    root: str = Field(description="Folder or s3:// prefix of the reference files.")

    def _uri(self, key: dg.AssetKey, partition: str | None = None) -> str:
        return storage.join(self.root, *key.path, *([partition] if partition else [])) + ".json"

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store `obj` atomically. Raises `TypeError` for anything but a pydantic model."""
        if not isinstance(obj, BaseModel):
            raise TypeError(
                f"asset {context.asset_key.to_user_string()} returned {type(obj).__name__}, not a reference"
            )
        data = obj.model_dump_json(indent=2).encode()
        for partition in context.asset_partition_keys if context.has_asset_partitions else ():
            storage.write_bytes(self._uri(context.asset_key, partition), data)
        storage.write_bytes(self._uri(context.asset_key), data)

    def load_input(self, context: dg.InputContext) -> object:
        """The reference, validated against the type that the reader asks for.

        A run over several partitions reads one reference for all of them, which one run over the same partitions must
        have stored. Raises `dagster.Failure` if there is none.
        """
        name = context.asset_key.to_user_string()
        partitions = context.asset_partition_keys if context.has_asset_partitions and context.has_partition_key else ()
        uris = [self._uri(context.asset_key, partition) for partition in partitions] or [self._uri(context.asset_key)]
        uri = uris[0]
        try:
            data = storage.read_bytes(uri)
            differing = [other for other in uris[1:] if storage.read_bytes(other) != data]
        except FileNotFoundError as error:
            raise dg.Failure(
                f"asset {name} has not been materialized here: {error}. Materialize it first.", allow_retries=False
            ) from error
        if differing:
            raise dg.Failure(
                f"{uri} and {differing[0]} differ: partitions of {name} that were materialized in several runs cannot "
                "be read by one run over all of them. Include it in this run",
                allow_retries=False,
            )
        try:
            return TypeAdapter(context.dagster_type.typing_type).validate_json(data)
        except ValidationError as error:
            raise dg.Failure(
                f"{uri} was written by another version of the code. Materialize {name} again. ({error})",
                allow_retries=False,
            ) from error
