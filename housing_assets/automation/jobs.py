"""Jobs that materialize a part of the graph, and the schedule of retraining."""

import dagster as dg

from housing_assets.settings import Settings

_SETTINGS = Settings.load()
_INGESTION = dg.AssetSelection.assets("raw_csv", "feature_group")
_TRAINING = dg.AssetSelection.assets(
    "train_split", "validation_split", "test_split", "tuned_model", "evaluation_report", "registered_model"
)
_ENDPOINT = dg.AssetSelection.assets("endpoint")  # a text would be parsed, by a parser that takes 0.05 s to import


ingest = dg.define_asset_job(
    "ingest", selection=_INGESTION, description="Validate files and add their rows to the feature store."
)
retrain = dg.define_asset_job(
    "retrain",
    selection=_TRAINING,
    description="Splits, search, evaluation and registration, on what the feature store holds now.",
)
deploy_endpoint = dg.define_asset_job(
    "deploy_endpoint",
    selection=_ENDPOINT,
    description="Serve an approved version: the latest registered, or `version`.",
)
rollback_endpoint = dg.define_asset_job(
    "rollback_endpoint",
    selection=_ENDPOINT,
    config={"ops": {"endpoint": {"config": {"rollback": True}}}},
    description="Serve again what the endpoint served before. It is tested like every other version.",
)

weekly_retraining = dg.ScheduleDefinition(
    name="weekly_retraining",
    job=retrain,
    cron_schedule=_SETTINGS.retrain_cron,
    execution_timezone=_SETTINGS.timezone,
    description="Retrains on what the feature store holds (HOUSING_RETRAIN_CRON, HOUSING_TIMEZONE).",
)

JOBS = [ingest, retrain, deploy_endpoint, rollback_endpoint]
