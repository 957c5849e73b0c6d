"""Step: ingest validated rows into a feature store.

Passes of Ray Data, by tasks (or, where their number is configured, actors), compare the rows with what is stored, write
what is new or changed, and read it back; where there is an online store, they bring it up to date; then one commit
makes all visible. If a single row cannot be read back, nothing is committed and the step fails.
"""

from __future__ import annotations

from functools import partial

import ray

from step_scripts.feature_store.ingestion import Ingestion
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.parameters import IngestFeaturesParams
from step_scripts.runner.contract import StepContext, StepDefinition, StepOutcome
from step_scripts.runner.ray_data import each_call


def run(context: StepContext, params: IngestFeaturesParams) -> StepOutcome:
    """Ingest the artifact `rows`; see `Ingestion.ingest`."""
    return Ingestion(
        OfflineStore(params.target.root).folder(params.group),
        context,
        params,
        run=partial(each_call, actors=params.num_actors),
        workers=params.num_actors or max(1, int(ray.cluster_resources().get("CPU", 1))),
    ).ingest()


STEP = StepDefinition(params=IngestFeaturesParams, run=run, inputs=("rows",), outputs=("features",))
