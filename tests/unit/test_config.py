"""Run configuration: defaults, ranges, messages; and the environment."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from housing_assets.config import CONFIG_OF_OP, TunedModelConfig, check_run_config
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
