"""Run configuration: defaults, ranges, messages; and the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from housing_assets.config import TunedModelConfig
from housing_assets.config_fields import CONFIG_OF_OP, check_run_config
from housing_assets.deployments import SourceLocation, load_resources
from step_scripts.parameters import PRESETS


def check(op: str, **config: Any) -> None:
    check_run_config({"ops": {op: {"config": config}}})


@pytest.mark.parametrize(
    ("op", "config", "message"),
    [
        ("splits", {"train_size": 0.7}, "splits: train_size + validation_size + test_size must be 1, not 1.1"),
        ("splits", {"train_size": 1.0}, "splits.train_size = 1.0: Input should be less than 1"),
        (
            "raw_csv",
            {"max_rejected_fraction": 2},
            "raw_csv.max_rejected_fraction = 2: Input should be less",
        ),
        ("raw_csv", {"duplicate_rows": "drop"}, "Input should be 'reject' or 'keep'"),
        ("tuned_model", {"num_trials": 0}, "tuned_model.num_trials = 0: Input should be greater than or equal to 1"),
        ("tuned_model", {"preset": "best"}, "Input should be 'default' or 'article'"),
        ("tuned_model", {"eta_min": 0.9}, "tuned_model: eta_min (0.9) must not be greater than eta_max"),
        ("evaluation_report", {"rmse_threshold": 0}, "Input should be greater than 0"),
        ("registered_model", {"approval": "yes"}, "Input should be 'automatic' or 'manual'"),
        ("endpoint", {"endpoint_name": "a b"}, "endpoint.endpoint_name = 'a b': String should match pattern"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(op: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(dg.Failure) as failure:
        check(op, **config)
    assert message in str(failure.value.description)


def test_all_wrong_values_are_reported_together() -> None:
    with pytest.raises(dg.Failure) as failure:
        check("tuned_model", num_trials=0, subsample_min=-1.0)
    assert "num_trials" in str(failure.value.description)
    assert "subsample_min" in str(failure.value.description)


def test_right_values_and_foreign_ops_pass() -> None:
    check("splits", train_size=0.8, validation_size=0.1, test_size=0.1)
    check("something_else", x=1)
    check_run_config({})


def test_presets_fill_what_is_not_set() -> None:
    article = TunedModelConfig(preset="article", num_trials=7).resolved()
    assert (article["max_depth_min"], article["max_depth_max"]) == (1, 8)
    assert (article["eta_min"], article["eta_max"]) == (0.2, 1.0)
    assert (article["min_child_weight_min"], article["min_child_weight_max"]) == (0, 120)
    assert (article["subsample_min"], article["subsample_max"]) == (0.2, 1.0)
    assert (article["num_boost_round"], article["num_trials"]) == (100, 7)
    assert TunedModelConfig().resolved()["num_trials"] == PRESETS["default"]["num_trials"]


def test_every_field_has_a_description() -> None:
    for op, config in CONFIG_OF_OP.items():
        for name, field in config.model_fields.items():
            assert field.description, f"{op}.{name}"


def test_resources_follow_the_environment() -> None:
    environment = {
        "HOUSING_ROOT": "somewhere",
        "HOUSING_RAW_CSV": "s3://bucket/*.csv",
        "HOUSING_NUM_CPUS": "3",
        "HOUSING_CACHE": "off",
        "RAY_ADDRESS": "10.0.0.1:6379",
    }
    resources = load_resources(environment)
    assert resources["compute"].num_cpus == 3
    assert resources["compute"].address == "10.0.0.1:6379"
    assert resources["compute"].use_cache is False
    assert resources["source_location"].resolve() == "s3://bucket/*.csv"
    assert resources["feature_store"].root.endswith("/somewhere/feature_store")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HOUSING_DEPLOYMENT": "moon"}, "HOUSING_DEPLOYMENT='moon': choose one of local"),
        ({"HOUSING_NUM_CPUS": "two"}, "HOUSING_NUM_CPUS='two' is not an integer"),
        ({"HOUSING_RESOURCE_WAIT_SECONDS": "long"}, "HOUSING_RESOURCE_WAIT_SECONDS='long' is not a number"),
        ({"HOUSING_CACHE": "maybe"}, "HOUSING_CACHE='maybe': choose on or off"),
        ({"HOUSING_ROOT": "s3://bucket/x"}, "HOUSING_ROOT='s3://bucket/x': with HOUSING_DEPLOYMENT=local it must be a"),
        ({"HOUSING_ROOT": "file:///data"}, "HOUSING_ROOT='file:///data': with HOUSING_DEPLOYMENT=local it must be a"),
        ({"HOUSING_ROOT": __file__}, "is a file: name a folder"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_resources(environment)
    assert message in str(error.value)


def test_without_a_source_the_same_sample_is_generated_once(tmp_path: Any) -> None:
    location = SourceLocation(sample_folder=str(tmp_path), sample_rows=50)
    first = location.resolve()
    content = open(first, "rb").read()  # noqa: PTH123, SIM115
    assert content.count(b"\n") == 51
    assert location.resolve() == first


AWS = {
    "HOUSING_DEPLOYMENT": "sagemaker",
    "HOUSING_ROOT": "s3://bucket/housing",
    "HOUSING_ROLE_ARN": "arn:aws:iam::123456789012:role/housing",
}


def sagemaker(folder: Path, sections: dict[str, Any], **variables: str) -> dict[str, Any]:
    """Resources of the deployment with a file of sections."""
    file = folder / "sagemaker.yaml"
    file.write_text(yaml.safe_dump(sections))
    return load_resources({**AWS, "HOUSING_SAGEMAKER_CONFIG": str(file), **variables})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"computer": {}}, "computer is unknown; did you mean compute? Known are compute, feature_store"),
        ({"compute": {"jobs": {}}}, "compute.jobs is unknown; did you mean job?"),
        (
            {"compute": {"job": {"volume_kms_keys": "x"}}},
            "compute.job.volume_kms_keys is unknown; did you mean volume_k",
        ),
        ({"compute": {"steps": {"tune_model": {"spot": True}}}}, "compute.steps.tune_model.spot is unknown"),
        ({"compute": {"steps": {"tune": {}}}}, "tune is no step; there are validate_source, ingest_features"),
        (
            {"compute": {"job": {"instance_groups": [{"name": "a", "type": "ml.m5.large"}]}}},
            "compute.job.instance_groups[0].type is unknown",
        ),
        ({"feature_store": {"online": True}}, "feature_store.online is unknown; did you mean online_store?"),
        ({"compute": {"patience_seconds": 9}}, "compute.patience_seconds is now called retry_timeout_seconds"),
        ({"model_registry": {"images": "x"}}, "model_registry.images is unknown; did you mean image?"),
        ({"endpoint_host": {"data_capture": {"percentage": 20}}}, "did you mean sampling_percentage?"),
        ({"endpoint_host": {"traffic": {"percent": 10, "alarms": []}}}, "endpoint_host.traffic.alarms is unknown"),
        (
            {"endpoint_host": {"prove_on_candidate": False}},
            "endpoint_host.prove_on_candidate is now called smoke_test_on_candidate",
        ),
        ({"compute": {"job": {"volume_kms_key": "alias/housing"}}}, "take the id or the ARN of a key, no alias"),
        ({"endpoint_host": {"traffic": {"mode": "linear", "percent": 5}}}, "linear steps have 10 to 50 %"),
        ({"endpoint_host": {"serverless": {}}}, "endpoint_host.serverless needs a custom image"),
        ({"endpoint_host": {"network_isolation": True}}, "endpoint_host.network_isolation needs a custom image"),
        ({"compute": {"steps": {"evaluate_model": {"use_spot": True}}}}, "evaluate_model is a processing job"),
        ({"compute": {"steps": {"tune_model": {"max_wait_seconds": 9}}}}, "is for managed spot training: set use_spot"),
    ],
)
def test_what_aws_or_the_project_does_not_know_is_refused_when_the_code_location_loads(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        sagemaker(tmp_path, sections)
    assert message in str(error.value)


def test_a_step_has_settings_of_its_own(tmp_path: Path) -> None:
    own = {"use_spot": True, "max_wait_seconds": 200_000, "output_kms_key": "alias/x", "instance_count": 4}
    sections = {"compute": {"job": {"instance_count": 2}, "steps": {"tune_model": own}}}
    compute = sagemaker(tmp_path, sections)["compute"]
    assert compute.config_of("tune_model").model_dump().items() >= own.items()
    assert compute.config_of("evaluate_model").use_spot is False
    custom = {"endpoint_host": {"network_isolation": True}}
    assert sagemaker(tmp_path, custom, HOUSING_IMAGE="image")["endpoint_host"].network_isolation


def test_unknown_run_configuration_is_refused_at_every_level() -> None:
    with pytest.raises(dg.Failure) as failure:
        check("raw_csv", column_ranges={"PRICE": {"minimun": 1}}, max_rejected_fractions=0.1)
    text = str(failure.value.description)
    assert "raw_csv.column_ranges.PRICE.minimun is unknown; did you mean minimum?" in text
    assert "raw_csv.max_rejected_fractions is unknown; did you mean max_rejected_fraction?" in text
