"""Writes docs/configuration.md: `python -m housing_assets.reference > docs/configuration.md`."""

from __future__ import annotations

import types
import typing
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from housing_assets.config import CONFIG_OF_OP, TunedModelConfig
from housing_assets.maintenance.retention import PruneConfig
from housing_assets.maintenance.sweeper import SweepConfig
from housing_assets.maintenance.teardown import TeardownConfig
from step_scripts.parameters import PRESETS

# Of the assets, and of the jobs that clean up.
_CONFIGS = CONFIG_OF_OP | {
    "prune_old": PruneConfig,
    "sweep_abandoned": SweepConfig,
    "remove_everything": TeardownConfig,
}
ENVIRONMENT: dict[str, dict[str, tuple[str, str]]] = {
    "Everywhere": {
        "HOUSING_DEPLOYMENT": ("local", "`local` or `sagemaker`: which implementations the resources have."),
        "HOUSING_ROOT": ("./data", "Folder (`sagemaker`: s3:// prefix) of artifacts, feature store and registry."),
        "HOUSING_ENVIRONMENT": ("none", "For example `staging`: places and names of its own, below `environments/`. On "
                                "branch deployments of Dagster+ the branch's, whatever is set."),
        "HOUSING_RAW_CSV": ("generated data", "Path, folder, glob or s3:// URI of the source files; `~` is the home "
                            "folder."),
        "HOUSING_CONFIG": ("none", "YAML file with run configuration that every launch has unless it says something "
                           "else; `~` is the home folder. See [below](#run-configuration)."),
        "HOUSING_SAMPLE_ROWS": ("10000", "Rows to generate when there is no source."),
        "HOUSING_CACHE": ("on", "`off`: run every step, even if nothing has changed."),
        "HOUSING_DATA_CAPTURE": ("off", "`on`: the endpoint keeps requests and answers, for `prediction_drift`."),
        "HOUSING_CAPTURE_PERCENT": ("100", "Share of the requests that is kept, percent."),
        "HOUSING_CAPTURE_MEGABYTES": ("100; `sagemaker`: 10000", "Bound of what an endpoint keeps; the oldest make "
                                      "room (`sagemaker`: when job `prune` runs)."),
        "HOUSING_CAPTURE_DAYS": ("30", "What is older is removed when job `prune` runs."),
        "HOUSING_CACHE_HOURS": ("12", "How long an earlier run's result is reused."),
        "DAGSTER_HOME": ("./.dagster (make)", "Dagster's runs and events."),
    },
    "Local": {
        "HOUSING_NUM_CPUS": ("all", "CPUs that local Ray may use."),
        "RAY_ADDRESS": ("none", "An existing Ray cluster to use; it is never shut down. See [clusters](clusters.md)."),
        "HOUSING_RAY_CONNECT_SECONDS": ("60", "How long the cluster at `RAY_ADDRESS` may take to answer."),
        "HOUSING_RESOURCE_WAIT_SECONDS": ("1800", "How long search and final fit wait for CPUs that others use."),
        "HOUSING_ENDPOINT_PORT": ("8080, or a free one", "Port of the local endpoint."),
    },
    "SageMaker": {
        "HOUSING_ROLE_ARN": ("required", "ARN of the IAM role that jobs and endpoints run as."),
        "AWS_REGION": ("boto3's", "AWS region."),
        "HOUSING_IMAGE": ("AWS's XGBoost image", "Image of jobs and endpoints, built from the Dockerfile."),
        "HOUSING_INSTANCE_TYPE": ("ml.m5.xlarge", "Instance type of jobs."),
        "HOUSING_INSTANCE_COUNT": ("1", "Hosts of each job; Ray spans them."),
        "HOUSING_SUBNETS": ("SageMaker's network", "VPC subnets of jobs, separated by commas."),
        "HOUSING_SECURITY_GROUPS": ("none", "Security groups of jobs; needed with subnets."),
        "HOUSING_PRICE_PER_HOUR": ("none", "Price of one instance-hour, for cost estimates."),
        "HOUSING_SAGEMAKER_CONFIG": ("none", "YAML file with every other field of the resources, by resource."),
    },
    "Automation": {
        "HOUSING_LANDING": ("none", "Folder or s3:// prefix where new files arrive; days become partitions."),
        "HOUSING_LANDING_START": ("2025-01-01", "First day of ingestion that can be backfilled."),
        "HOUSING_SETTLE_SECONDS": ("60", "A file is taken once it is unchanged for so long; ten times as long if "
                                   "its last line has no line end."),
        "HOUSING_RETRAIN_CRON": ("0 3 * * 1", "When `weekly_retraining` runs."),
        "HOUSING_TIMEZONE": ("UTC", "Time zone of the schedules and of the days of ingestion."),
        "HOUSING_FRESHNESS_DAYS": ("8", "A model or an endpoint older than this is stale."),
        "HOUSING_WATCH_CRON": ("*/15 * * * *", "When `endpoint_watch` looks at the endpoint."),
        "HOUSING_DRIFT_DAYS": ("7", "Captured requests of so many days are compared with the training data."),
        "HOUSING_DRIFT_ROWS": ("200", "With fewer captured rows, nothing is said about drift."),
        "HOUSING_PRUNE_CRON": ("37 2 * * *", "When `nightly_prune` removes what is old."),
        "HOUSING_KEEP_VERSIONS": ("10", "So many newest versions of a model stay, and those that are needed."),
        "HOUSING_PENDING_DAYS": ("30", "Versions that wait for a decision stay for so many days."),
        "HOUSING_REPEAT_HOURS": ("24", "What `hourly_sweep` has reported is reported again after so long."),
        "HOUSING_NOTIFIER": ("log", "How notifications are sent: `log`, `slack`, `email`, `sns`."),
        "HOUSING_SLACK_WEBHOOK": ("none", "URL of Slack's incoming webhook. A secret."),
        "HOUSING_SNS_TOPIC": ("none", "ARN of the topic."),
        "HOUSING_SMTP_HOST": ("none", "SMTP server; also `HOUSING_SMTP_PORT` (587), `_SENDER`, `_RECIPIENTS`, `_USER`, "
                              "`_PASSWORD`."),
        "HOUSING_SMTP_ALLOW_INSECURE": ("off", "`on`: send also without encryption, or to a server whose certificate "
                                        "cannot be verified."),
        "HOUSING_MLFLOW_URI": ("none", "Tracking server, database, or ARN: tuning runs are recorded in MLflow. "
                               "No password in it."),
        "HOUSING_MLFLOW_EXPERIMENT": ("housing", "Name of the experiment."),
        "HOUSING_MLFLOW_ARTIFACTS": ("the server's", "Where a new experiment keeps artifacts."),
    },
}  # fmt: skip


def reference() -> str:
    """The page, as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Generated by `python -m housing_assets.reference`; a test compares it with the code.",
        "",
        "## Environment variables",
        *(line for chapter, variables in ENVIRONMENT.items() for line in _variables(chapter, variables)),
        "",
        "## Run configuration",
        "",
        "In the launchpad of the UI, or in a file: `make run CONFIG=file.yaml`, "
        "`dagster asset materialize ... --config file.yaml`. Sections stand below `ops: <name>: config:`.",
        "",
        "Such a file, named by `HOUSING_CONFIG`, gives every launch its defaults: the launchpad, which shows them, "
        '"Materialize all", sensors, schedules, jobs and `make run`. A launch\'s own values win, field by field. The '
        "file configures assets only. Fields and values that are wrong, columns that the table lacks among them, are "
        "refused when the code location loads; after a change of the file, reload it.",
    ]
    for op, config in _CONFIGS.items():
        lines += ["", f"### {op}", "", (config.__doc__ or "").strip(), ""]
        lines += ["| field | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_default(op, name, field)} | {_allowed(field)} | {field.description} |"
            for name, field in config.model_fields.items()
        ]
    lines += ["", "### Presets of tuned_model", "", "| field | " + " | ".join(PRESETS) + " |"]
    lines += ["|---|" + "---|" * len(PRESETS)]
    lines += [
        f"| `{name}` | " + " | ".join(f"{preset[name]:g}" for preset in PRESETS.values()) + " |"
        for name in PRESETS["default"]
    ]
    return "\n".join(lines) + "\n"


def _variables(chapter: str, variables: dict[str, tuple[str, str]]) -> list[str]:
    rows = [f"| `{name}` | {default} | {meaning} |" for name, (default, meaning) in variables.items()]
    return ["", f"### {chapter}", "", "| variable | default | meaning |", "|---|---|---|", *rows]


def _default(op: str, name: str, field: FieldInfo) -> str:
    if _CONFIGS[op] is TunedModelConfig and name in PRESETS["default"]:
        return "preset"
    value = field.get_default(call_default_factory=True)
    if value is None or value == {} or value == "":
        return ""
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(field: FieldInfo) -> str:
    limits = []
    for limit in field.metadata:
        for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(limit, kind):
                limits.append(f"{sign} {getattr(limit, kind.__name__.lower()):g}")
    choices = _choices(field.annotation)
    return ", ".join([*limits, *(f"`{choice}`" for choice in choices)])


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    return []


if __name__ == "__main__":
    print(reference(), end="")
