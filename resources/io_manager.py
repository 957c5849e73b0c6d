"""Stores references between assets as JSON files, locally or on S3."""

import dagster as dg
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from step_scripts import storage


class ReferenceIOManager(dg.ConfigurableIOManager):
    """Keeps the latest reference of every asset (and partition) at `<root>/<asset>[/<partition>].json`.

    Only pydantic models are stored, so that nothing but data is ever read back.
    """

    root: str = Field(description="Folder or s3:// prefix of the reference files.")

    def _uri(self, context: dg.InputContext | dg.OutputContext) -> str:
        parts = list(context.asset_key.path)
        if context.has_asset_partitions:
            parts.append(context.asset_partition_key)
        return storage.join(self.root, *parts) + ".json"

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store `obj` atomically. Raises `TypeError` for anything but a pydantic model."""
        if not isinstance(obj, BaseModel):
            raise TypeError(
                f"asset {context.asset_key.to_user_string()} returned {type(obj).__name__}, not a reference"
            )
        storage.write_bytes(self._uri(context), obj.model_dump_json(indent=2).encode())

    def load_input(self, context: dg.InputContext) -> object:
        """The reference, validated against the type that the reader asks for."""
        uri, name = self._uri(context), context.asset_key.to_user_string()
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError as error:
            raise dg.Failure(
                f"asset {name} has not been materialized here: {uri} does not exist. Materialize it first.",
                allow_retries=False,
            ) from error
        try:
            return TypeAdapter(context.dagster_type.typing_type).validate_json(data)
        except ValidationError as error:
            raise dg.Failure(
                f"{uri} was written by another version of the code. Materialize {name} again. ({error})",
                allow_retries=False,
            ) from error
