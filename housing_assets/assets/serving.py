"""The HTTP endpoint that predicts prices."""

import dagster as dg

from housing_assets.checks.comparisons import smoke_test_from
from housing_assets.checks.gate import refusal, require_checks_passed
from housing_assets.config import EndpointConfig
from housing_assets.reporting.lineage import lineage_rows
from housing_assets.reporting.metadata import run_costs, run_timeline
from resources.compute.base import as_metadata, table
from resources.endpoints.base import EndpointDeploymentFailed, EndpointHost, EndpointStatus, VersionNotApproved
from resources.model_registry.base import ModelRegistry, ModelVersion, ModelVersionNotFound, split_reference
from resources.references.evidence import EvidenceStore
from resources.references.types import SplitRef
from resources.services.optional import extra
from step_scripts.runner.code_version import module_version


@dg.asset(group_name="serving", kinds={"xgboost"}, code_version=module_version("serve_model"))
def endpoint(
    context: dg.AssetExecutionContext,
    config: EndpointConfig,
    registered_model: ModelVersion,
    test_split: SplitRef,
    model_registry: ModelRegistry,
    endpoint_host: EndpointHost,
    evidence: EvidenceStore,
) -> dg.MaterializeResult[EndpointStatus]:
    """The endpoint that serves the approved version: raw features in, prices out, over HTTP.

    A new version is tried beside the one that serves, with rows whose predictions are known, and takes over only if
    they agree. It goes on serving when the run has ended.
    """
    name = config.endpoint_name or endpoint_host.default_name
    group, number = registered_model.group, config.version
    if config.rollback:
        group, number = _served_before(name, endpoint_host)
    try:
        version = model_registry.get(group, number or registered_model.version)
    except ModelVersionNotFound as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    if number is None and version.artifact.digest != registered_model.artifact.digest:
        raise refusal(f"{version.reference} in the registry is another model", "materialize registered_model again")
    if not version.gate.passed:
        raise refusal(
            f"{version.reference} has no passed evaluation", "materialize evaluation_report and registered_model"
        )
    require_checks_passed(context, evidence, "endpoint", version)
    smoke_test = smoke_test_from(version.artifact, test_split.rows, config.smoke_test_rows)
    try:
        status = endpoint_host.deploy(name, version, smoke_test, context.log)
    except VersionNotApproved as error:
        remedy = f"Launch job approve_model with version {version.version}, then materialize endpoint."
        raise dg.Failure(f"{version.reference} is {version.status}. {remedy}", allow_retries=False) from error
    except EndpointDeploymentFailed as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    metadata = {
        "endpoint_name": status.name,
        "url": dg.MetadataValue.url(status.url),
        "model_version": version.reference,
        "version": version.version,
        "model_digest": status.model_digest,
        "smoke_test_rows": len(smoke_test.expected),
    }
    run_id, instance = context.run.run_id, context.instance
    metadata |= extra("lineage", lambda: table(lineage_rows(version, status, deployed_by=run_id)), context.log)
    metadata |= extra("costs", lambda: run_costs(instance, run_id), context.log).get("costs", {})
    metadata |= extra("run_timeline", lambda: table(run_timeline(instance, run_id)), context.log)
    metadata |= status.smoke_test.latency if status.smoke_test else {}
    return dg.MaterializeResult(
        value=status,
        metadata=as_metadata(metadata),
        data_version=dg.DataVersion(f"{status.name}:{status.model_digest}"),
    )


def _served_before(name: str, host: EndpointHost) -> tuple[str, int]:
    status = host.describe(name)
    if status is None or status.previous_version is None:
        raise dg.Failure(f"endpoint {name} has served no other version that one could go back to", allow_retries=False)
    return split_reference(status.previous_version)
