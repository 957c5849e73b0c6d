"""What runs have left for later ones, without the runs."""

from __future__ import annotations

import dagster as dg
from pydantic import BaseModel

from resources.references.io_manager import REFERENCE, StoredReference


def leave(instance: dg.DagsterInstance, root: str, asset: str, value: BaseModel, partition: str | None = None) -> str:
    """The reference of a materialization of `asset`: its file, and the event that names it. Returns the URI."""
    stored = StoredReference(
        asset=asset,
        partitions=(partition,) if partition else (),
        run_id="run-1",
        value=value.model_dump(mode="json"),
    )
    uri = stored.write(root)
    instance.report_runless_asset_event(
        dg.AssetMaterialization(asset, partition=partition, metadata={REFERENCE: dg.MetadataValue.path(uri)})
    )
    return uri
