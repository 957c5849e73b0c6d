"""The code location: all assets, checks, jobs, schedules, sensors and resources, as Dagster loads them."""

import gc

import dagster as dg

# `import dagster` has made 110,000 objects that are never freed. Without this line the garbage collector goes through
# all of them several times while the modules below are loaded (nearly half of the time), and again during the run.
gc.freeze()

from housing_assets import code_location
from housing_assets.assets import ingestion, model, serving, splits
from housing_assets.automation.jobs import JOBS, automated, weekly_retraining
from housing_assets.automation.sensors import SENSORS
from housing_assets.checks import ingestion as ingestion_checks
from housing_assets.checks import model as model_checks
from housing_assets.checks import serving as serving_checks
from housing_assets.checks import splits as splits_checks
from housing_assets.checks.serving import watch_endpoint, watch_schedule
from housing_assets.config import SLICES, RawCsvConfig
from housing_assets.deployments import load_resources
from housing_assets.maintenance.retention import compact, nightly_prune, prune
from housing_assets.maintenance.sweeper import hourly_sweep, sweep
from housing_assets.maintenance.teardown import teardown
from housing_assets.partitions import BACKFILL
from housing_assets.reporting.lineage import lineage
from housing_assets.reporting.summary import console_logger
from housing_assets.runs.executor import in_process_executor
from housing_assets.table_verdict import check_table

OWNERS = ["team:ml-platform"]

# Fails here, not in the middle of a run, if schema, slices and the column ranges of HOUSING_CONFIG do not fit together.
check_table(SLICES, RawCsvConfig.model_fields["column_ranges"].get_default(call_default_factory=True))

# Each asset gets its owners, its automation condition and its freshness policy (`automated`), and one backfill policy:
# assets with daily partitions and assets without any can then be materialized for a range of days in one run.
assets = [
    asset.map_asset_specs(lambda spec: automated(spec.replace_attributes(owners=OWNERS))).with_attributes(
        backfill_policy=BACKFILL
    )
    for asset in dg.load_assets_from_modules([ingestion, splits, model, serving])
    if isinstance(asset, dg.AssetsDefinition)
]

refresh = dg.define_asset_job(
    "refresh",
    selection=dg.AssetSelection.all(),
    description="Materialize everything, from the CSV files to the endpoint.",
)

defs = dg.Definitions(
    assets=assets,
    asset_checks=dg.load_asset_checks_from_modules([ingestion_checks, splits_checks, model_checks, serving_checks]),
    jobs=[refresh, *JOBS, watch_endpoint, lineage, prune, compact, sweep, teardown],
    schedules=[weekly_retraining, watch_schedule, hourly_sweep, nightly_prune],
    sensors=SENSORS,
    resources=load_resources(),
    # The graph is a chain, and Ray does the work in parallel: a run needs one process, and has one Ray session.
    executor=in_process_executor,
    loggers={"console": console_logger},
)
# Checks and jobs look up the whole graph; they cannot import this module, which imports them.
code_location.register(defs)
