"""More than one environment: places and names of their own, and nothing changes for who has only one."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from housing_assets.assets.ingestion import default_group_name
from housing_assets.deployments import load_resources
from housing_assets.settings import Settings
from resources.aws.request_validation import check_request
from resources.model_registry.local import LocalModelRegistry

SAGEMAKER = {
    "HOUSING_DEPLOYMENT": "sagemaker",
    "HOUSING_ROOT": "s3://bucket/housing/",
    "HOUSING_ROLE_ARN": "arn:aws:iam::123456789012:role/housing",
}
BRANCH = {"DAGSTER_CLOUD_IS_BRANCH_DEPLOYMENT": "1"}


def test_without_an_environment_names_and_places_are_the_plain_ones() -> None:
    resources = load_resources(SAGEMAKER)
    assert resources["endpoint_host"].default_name == resources["model_registry"].default_group == "housing"
    assert resources["compute"].name_prefix == "housing"
    assert resources["feature_store"].name_suffix == ""
    assert resources["compute"].artifact_root == "s3://bucket/housing/artifacts"
    assert Settings.load({"HOUSING_ROOT": "/data"}).own_root == "/data"


@pytest.mark.parametrize("variables", [SAGEMAKER, {"HOUSING_ROOT": "/data"}], ids=["sagemaker", "local"])
def test_environments_share_nothing(variables: dict[str, str]) -> None:
    seen: list[set[str]] = []
    for extra in (
        {},
        {"HOUSING_ENVIRONMENT": "staging"},
        {"HOUSING_ENVIRONMENT": "production"},
        BRANCH | {"DAGSTER_CLOUD_GIT_BRANCH": "staging"},
        BRANCH | {"DAGSTER_CLOUD_GIT_BRANCH": "Staging"},
    ):
        resources = load_resources(variables | extra)
        names = {
            resources["endpoint_host"].default_name,
            resources["feature_store"].name_suffix,
            *(resources[name].root for name in ("feature_store", "model_registry", "endpoint_host", "io_manager")),
            resources["compute"].artifact_root,
        }
        assert all(not names & others for others in seen)
        seen.append(names)


def test_a_branch_never_has_the_places_of_the_environment_it_is_configured_with() -> None:
    variables = BRANCH | {"DAGSTER_CLOUD_GIT_BRANCH": "fix/prices", "HOUSING_ENVIRONMENT": "production"}
    name = Settings.load(variables).own_environment
    assert name is not None
    assert name.startswith("branch-fix-prices-")
    assert "production" not in Settings.load(variables | {"HOUSING_ROOT": "/data"}).own_root
    assert Settings.load(
        {"DAGSTER_CLOUD_IS_BRANCH_DEPLOYMENT": "0", "HOUSING_ENVIRONMENT": "production"}
    ).own_environment == ("production")


@settings(deadline=None, max_examples=50)
@given(branch=st.text(min_size=1).filter(str.strip))
@example(branch="feature/" + "x" * 200)
@example(branch="---")
@example(branch="ветка")
def test_names_of_every_branch_are_allowed_everywhere(branch: str) -> None:
    variables = SAGEMAKER | BRANCH | {"DAGSTER_CLOUD_GIT_BRANCH": branch}
    resources = load_resources(variables)
    name = resources["endpoint_host"].default_name
    group = default_group_name("house_sales", "s3://bucket/source") + resources["feature_store"].name_suffix
    check_request("DescribeEndpoint", {"EndpointName": name})
    check_request("DescribeModelPackageGroup", {"ModelPackageGroupName": resources["model_registry"].default_group})
    check_request("DescribeFeatureGroup", {"FeatureGroupName": group})
    assert LocalModelRegistry(root="/nowhere").list(name) == []
    assert len(name) <= 40  # whole in the names of its models and configurations


@pytest.mark.parametrize("name", ["Staging", "a b", "-a", "a--b", "x" * 29, "../b"])
def test_a_name_that_does_not_fit_names_the_variable(name: str) -> None:
    with pytest.raises(ValueError, match="HOUSING_ENVIRONMENT="):
        load_resources({"HOUSING_ENVIRONMENT": name})
