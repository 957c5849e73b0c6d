"""`HOUSING_CONFIG`: run configuration that every launch has unless it says something else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from housing_assets import config_fields
from housing_assets.config import ColumnBounds, RawCsvConfig, SplitsConfig
from housing_assets.config_fields import configures, load_launch_defaults, refuse_unknown_ops, with_defaults
from tests import ROOT


def written(folder: Path, content: Any) -> dict[str, str]:
    """The environment with a file of that content."""
    file = folder / "defaults.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return {"HOUSING_CONFIG": str(file)}


# What a launch without configuration gets, what the launchpad shows, and what a launch's own value leaves of it.
PROGRAM = """
import json
from dagster._core.system_config.objects import ResolvedRunConfig
from housing_assets.config_fields import check_run_config
from housing_assets.definitions import defs

refresh, retrain = defs.resolve_job_def("refresh"), defs.resolve_job_def("retrain")
own = {"ops": {"splits": {"config": {"train_size": 0.7, "validation_size": 0.2}}}}
check_run_config(own)
shown = retrain.graph.node_named("evaluation_report").definition.config_schema.config_type.fields["rmse_threshold"]
print(json.dumps({
    "raw_csv": ResolvedRunConfig.build(refresh, {}).ops["raw_csv"].config,
    "splits": ResolvedRunConfig.build(retrain, {}).ops["splits"].config,
    "own": ResolvedRunConfig.build(retrain, own).ops["splits"].config,
    "shown": shown.default_value_as_json_str,
    "schedule": defs.resolve_schedule_def("weekly_retraining").job_name,
}))
"""


def test_every_launch_has_the_values_of_the_file_and_its_own_win_field_by_field(tmp_path: Path) -> None:
    defaults = {
        "raw_csv": {"config": {"max_rejected_fraction": 0.02, "column_ranges": {"PRICE": {"minimum": -5}}}},
        "splits": {"config": {"train_size": 0.8, "validation_size": 0.1, "test_size": 0.1}},
        "evaluation_report": {"config": {"rmse_threshold": 40000}},
    }
    environment = os.environ | written(tmp_path, {"ops": defaults})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["raw_csv"]["max_rejected_fraction"] == 0.02
    assert found["raw_csv"]["column_ranges"] == {"PRICE": {"minimum": -5.0, "maximum": None}}
    assert found["raw_csv"]["duplicate_rows"] == "reject"
    assert (found["splits"]["train_size"], found["splits"]["test_size"]) == (0.8, 0.1)
    assert (found["own"]["train_size"], found["own"]["validation_size"], found["own"]["test_size"]) == (0.7, 0.2, 0.1)
    assert float(found["shown"]) == 40000
    assert found["schedule"] == "retrain"


def test_defaults_are_of_the_fields_types_and_launches_are_still_checked() -> None:
    raw_csv = with_defaults(RawCsvConfig, {"column_ranges": {"PRICE": {"minimum": 1}}, "max_rejected_fraction": 1})
    assert raw_csv().column_ranges == {"PRICE": ColumnBounds(minimum=1.0)}
    assert raw_csv(column_ranges={}).column_ranges == {}
    assert (raw_csv.__name__, raw_csv.__doc__) == (RawCsvConfig.__name__, RawCsvConfig.__doc__)
    assert raw_csv.model_fields["max_rejected_fraction"].description
    with pytest.raises(ValueError, match="less than or equal to 1"):
        raw_csv(max_rejected_fraction=2)
    assert RawCsvConfig().column_ranges == {}
    splits = with_defaults(SplitsConfig, {"train_size": 0.5, "validation_size": 0.25, "test_size": 0.25})
    with pytest.raises(ValueError, match=r"must be 1, not 1\.1"):
        splits(train_size=0.6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must hold sections with fields, as YAML"),
        ("a: b: c", "cannot be read"),
        ("raw_csv: {config: {}}", "It has raw_csv, which gives no defaults"),
        ("ops: [raw_csv]", "must be run configuration, as YAML: `ops: {raw_csv: {config: {…}}}`"),
        ("ops: {raw_csv: {delimiter: x}}", "ops.raw_csv has delimiter beside or instead of config"),
        ("ops: {raw_csv: {config: 7}}", "ops.raw_csv.config is not of this form"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_launch_defaults(written(tmp_path, content))
    assert "HOUSING_CONFIG='" in str(error.value)


def test_without_a_file_or_with_an_empty_one_nothing_changes(tmp_path: Path) -> None:
    assert load_launch_defaults({}) == load_launch_defaults(written(tmp_path, "")) == {}
    assert load_launch_defaults(written(tmp_path, "ops: {splits: }")) == {"splits": {}}
    with pytest.raises(ValueError, match=r"HOUSING_CONFIG='/nowhere\.yaml' cannot be read"):
        load_launch_defaults({"HOUSING_CONFIG": "/nowhere.yaml"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"raw_cvs": {}}, "HOUSING_CONFIG: ops.raw_cvs is unknown; did you mean raw_csv?"),
        ({"remove_everything": {}}, "ops.remove_everything is unknown"),
        ({"splits": {"train_sise": 0.6}}, "HOUSING_CONFIG: splits.train_sise is unknown; did you mean train_size?"),
        ({"splits": {1: 2}}, "splits.1 is unknown"),
        ({"splits": {"train_size": 0.9}}, "splits: train_size + validation_size + test_size must be 1, not 1.3"),
        ({"splits": {"as_of": "yesterday"}}, "splits.as_of = 'yesterday': it is not a date or time in ISO 8601"),
    ],
)
def test_wrong_fields_and_values_are_refused_when_the_code_location_loads(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(config_fields, "CONFIG_OF_OP", dict(config_fields.CONFIG_OF_OP))
    monkeypatch.setattr(config_fields, "_LAUNCH_DEFAULTS", given)

    def load() -> None:
        configures("splits")(SplitsConfig)
        refuse_unknown_ops()

    with pytest.raises(ValueError, match=re.escape(message)):
        load()


def test_the_names_of_the_ops_are_those_of_the_assets() -> None:
    """A new asset needs a class with `@configures` in `housing_assets/config.py`."""
    from housing_assets.definitions import defs

    ops = {a.node_def.name for a in defs.assets or () if isinstance(a, dg.AssetsDefinition)}
    assert set(config_fields.CONFIG_OF_OP) == ops
