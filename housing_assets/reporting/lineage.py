"""Where an endpoint's model comes from: version, evaluation, parameters, splits, feature group, data files, code, runs.

`python -m housing_assets.reporting.lineage [--endpoint NAME | --version GROUP/NUMBER]` prints it, job `lineage` shows
it, and the asset `endpoint` has it as metadata. It is read from the model registry, which keeps it with every version.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import dagster as dg
from pydantic import Field, JsonValue

from housing_assets.deployments import load_resources
from resources.compute.base import table
from resources.endpoints.base import EndpointHost, EndpointStatus
from resources.model_registry.base import ModelRegistry, ModelVersion, split_reference
from resources.references.evidence import Judged
from resources.references.types import EvaluationRef, ModelRef, SplitRef
from step_scripts.runner.code_version import module_version, step_version
from step_scripts.runner.wording import counted, number

COLUMNS = ("stage", "what", "where", "digest", "run", "code_version", "when")
FILES_SHOWN = 100
_DIGEST_SHOWN = 12


def lineage_facts(
    run_id: str, train: SplitRef, model: ModelRef, evaluation: EvaluationRef, judged: Sequence[Judged] = ()
) -> dict[str, JsonValue]:
    """What the registry keeps with a version.

    `train`: where the model does not say what it was fitted on. The latest split may be another one by now. `judged`:
    what blocking checks have judged, see `housing_assets.checks.gate`.
    """
    train = model.train or train
    snapshot = train.snapshot
    facts: dict[str, JsonValue] = {
        "run_id": run_id,
        "train_digest": train.rows.digest,
        "validation_digest": model.validation_digest,
        "test_digest": evaluation.test_digest,
        "evaluation_digest": evaluation.report.digest,
        "model_request_digest": model.request_digest,
        "train": {"uri": train.rows.uri, "rows": train.rows.rows},
        "evaluation_uri": evaluation.report.uri,
        "trained_at": model.made_at.isoformat() if model.made_at else None,
        "code_version": {
            "prepare_splits": train.code_version,
            "tune_model": model.code_version or step_version("tune_model"),
            "evaluate_model": evaluation.code_version or step_version("evaluate_model"),
        },
        "runs": {
            "feature_group": snapshot.run_id if snapshot else None,
            "splits": train.run_id,
            "tuned_model": model.run_id,
            "evaluation_report": evaluation.run_id,
        },
        "parameters": dict(model.parameters),
        "versions": dict(model.versions),
        "judged": [one.model_dump(mode="json") for one in judged],
    }
    if snapshot is not None:
        facts["feature_group"] = snapshot.model_dump(mode="json", exclude={"datasets", "run_id"})
        facts["datasets"] = [dataset.model_dump(mode="json") for dataset in snapshot.datasets]
    return facts


def lineage_rows(
    version: ModelVersion, endpoint: EndpointStatus | None = None, deployed_by: str = ""
) -> list[dict[str, str]]:
    """The table of `COLUMNS`, from the endpoint back to the data files. What was not recorded is empty."""
    facts = dict[str, Any](version.lineage)
    runs, codes = facts.get("runs") or {}, facts.get("code_version") or {}
    rows = []
    if endpoint is not None:
        code = module_version("serve_model") if deployed_by else None
        rows = [
            _row(
                "endpoint", f"{endpoint.name} serves {endpoint.version}", where=endpoint.url,
                digest=endpoint.model_digest, run=deployed_by, code_version=code, when=endpoint.deployed_at,
            )
        ]  # fmt: skip
    gate, decision, artifact = version.gate, version.status_history[-1], version.artifact
    rows += [
        _row(
            "model version", f"{version.reference}, {version.status} ({decision.who}: {decision.why})",
            where=artifact.uri, digest=artifact.digest, run=facts.get("run_id"), when=version.created_at,
        ),
        _row(
            "evaluation", f"{gate.metric} {number(gate.value)}, at most {number(gate.threshold)} allowed",
            where=facts.get("evaluation_uri"), digest=facts.get("evaluation_digest"),
            run=runs.get("evaluation_report") or gate.run_id, code_version=codes.get("evaluate_model"),
        ),
        _row(
            "training", _named(facts.get("parameters")), digest=facts.get("model_request_digest"),
            run=runs.get("tuned_model"), code_version=codes.get("tune_model"), when=facts.get("trained_at"),
        ),
        _row("libraries", _named(facts.get("versions"), " ")),
    ]  # fmt: skip
    places = {"train": facts.get("train") or {}}  # of the others only the digests are kept
    made = {"run": runs.get("splits"), "code_version": codes.get("prepare_splits")}
    for split in ("train", "validation", "test"):
        if digest := facts.get(f"{split}_digest"):
            count, place = places.get(split, {}).get("rows"), places.get(split, {}).get("uri")
            size = counted(count, "row") if count is not None else ""
            rows.append(_row(f"{split} split", size, where=place, digest=digest, **made))
    if group := facts.get("feature_group"):
        what = f"{group['group']}, commit {group['commit']}"
        what += f", as of {group['as_of']}" if group.get("as_of") else ""
        rows.append(_row("feature group", what, digest=group["digest"], run=runs.get("feature_group")))
    datasets = facts.get("datasets") or []
    rows += [row for dataset in reversed(datasets) for row in _dataset_rows(dataset)][:FILES_SHOWN]
    return rows


def _dataset_rows(dataset: Mapping[str, Any]) -> list[dict[str, str]]:
    known = {name: dataset.get(name) for name in ("digest", "code_version")}
    known |= {"run": dataset.get("run_id"), "when": dataset.get("ingested_at")}
    if not dataset.get("files"):
        return [_row("data", "its files were not recorded", where=dataset.get("source"), **known)]
    rows = []
    for file in dataset["files"]:
        count = f", {counted(file['rows'], 'row')}" if file.get("rows") is not None else ""
        rows.append(_row("data file", counted(file["bytes"], "byte") + count, where=file["uri"], **known))
    return rows


def _row(stage: str, what: str, *, digest: str | None = None, when: datetime | str | None = None, **more: Any) -> dict:
    """A row of `COLUMNS`; `more` are the others. What is not known is empty."""
    moment = when.isoformat(timespec="seconds") if isinstance(when, datetime) else when
    row = {"stage": stage, "what": what, "digest": (digest or "")[:_DIGEST_SHOWN], "when": moment, **more}
    return {name: row.get(name) or "" for name in COLUMNS}


def _named(values: Mapping[str, Any] | None, sign: str = "=") -> str:
    return ", ".join(
        f"{name}{sign}{value:.6g}" if isinstance(value, float) else f"{name}{sign}{value}"
        for name, value in (values or {}).items()
    )


def lineage_of(
    name: str, host: EndpointHost, registry: ModelRegistry, instance: dg.DagsterInstance | None = None
) -> list[dict[str, str]]:
    """The rows of an endpoint. Raises `LookupError` if there is none, or its version is gone from the registry.

    With `instance`, the run that deployed it is looked up there.
    """
    status = host.describe(name)
    if status is None:
        known = ", ".join(other.name for other in host.list()) or "none"
        raise LookupError(f"there is no endpoint {name}; there are: {known}")
    wanted = {"endpoint_name": status.name, "model_digest": status.model_digest}
    made = instance.fetch_materializations(dg.AssetKey("endpoint"), limit=50).records if instance else ()
    for record in made:
        shown = record.asset_materialization.metadata if record.asset_materialization else {}
        if wanted == {name: shown[name].value for name in wanted if name in shown}:
            return lineage_rows(version_of(status.version, registry), status, record.run_id)
    return lineage_rows(version_of(status.version, registry), status)


def version_of(reference: str, registry: ModelRegistry) -> ModelVersion:
    """The version `<group>/<number>`. Raises `LookupError`."""
    try:
        return registry.get(*split_reference(reference))
    except ValueError as error:
        raise LookupError(f"{reference!r} is no model version: give <group>/<number>") from error


def as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows for a terminal: a block a row, because places are long."""
    blocks = []
    for row in rows:
        details = [f"    {name:13}{row[name]}" for name in COLUMNS[2:] if row[name]]
        blocks.append("\n".join([f"{row['stage']:15}  {row['what']}".rstrip(), *details]))
    return "\n".join(blocks)


class LineageConfig(dg.Config):
    """Whose lineage."""

    endpoint_name: str | None = Field(default=None, description="Name of the endpoint. Empty: the deployment's.")


@dg.op
def show_lineage(
    context: dg.OpExecutionContext, config: LineageConfig, endpoint_host: EndpointHost, model_registry: ModelRegistry
) -> None:
    """Log the lineage of an endpoint, and keep it as a table."""
    name = config.endpoint_name or endpoint_host.default_name
    try:
        rows = lineage_of(name, endpoint_host, model_registry, context.instance)
    except LookupError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    context.log.info(as_text(rows))
    context.add_output_metadata({"lineage": table(rows)})


@dg.job
def lineage() -> None:
    """Show where an endpoint's model comes from: version, data files, code, runs, parameters."""
    show_lineage()


def main(arguments: Sequence[str]) -> int:
    """Print the lineage. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m housing_assets.reporting.lineage", description="Where an endpoint's model comes from."
    )
    parser.add_argument("--endpoint", help="name of the endpoint; default: the deployment's")
    parser.add_argument("--version", help="a model version, <group>/<number>, instead of an endpoint's")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    options = parser.parse_args(arguments)
    resources = load_resources()
    host, registry = resources["endpoint_host"], resources["model_registry"]
    try:
        if options.version:
            rows = lineage_rows(version_of(options.version, registry))
        else:
            rows = lineage_of(options.endpoint or host.default_name, host, registry)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write((json.dumps(rows, indent=2) if options.json else as_text(rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
