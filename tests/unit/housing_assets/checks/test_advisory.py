"""Checks that only advise: whatever happens in them, their run goes on, and people read why and what to do."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import dagster as dg
import pytest

from housing_assets.checks import ingestion, model, serving, splits
from housing_assets.checks.advisory import advisory_check, guarded
from housing_assets.checks.comparisons import stability_result
from housing_assets.definitions import defs
from resources.model_registry.local import LocalModelRegistry
from resources.references.types import SplitRef
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, file_info
from tests.registry_contract import register

MODULES: tuple[ModuleType, ...] = (ingestion, model, serving, splits)


class Broken:
    """An input or a resource that nothing can be asked of."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


def functions() -> dict[dg.AssetCheckKey, Any]:
    """The functions of the checks that block nothing."""
    found = [
        value for module in MODULES for value in vars(module).values() if isinstance(value, dg.AssetChecksDefinition)
    ]
    return {
        spec.key: cast("Any", d.node_def).compute_fn.decorated_fn
        for d in found
        for spec in d.check_specs
        if not spec.blocking
    }


def test_no_advisory_check_raises() -> None:
    graph = defs.resolve_asset_graph()
    checks = functions()
    assert set(checks) == {key for key in graph.asset_check_keys if not graph.get(key).blocking}
    for key, function in checks.items():
        result = function(**{name: Broken() for name in inspect.signature(function).parameters})
        assert (result.passed, result.severity) == (False, dg.AssetCheckSeverity.WARN), key
        assert "could not be judged: RuntimeError: no " in result.description, key
        assert "Remedy: " in result.description, key


class Panic(BaseException):
    """As Polars raises it."""


@pytest.mark.parametrize("error", [ValueError("wrong"), Panic("wrong")])
def test_a_run_succeeds_although_an_advisory_check_raises(error: BaseException) -> None:
    @dg.asset
    def served() -> None: ...

    @advisory_check(asset="served", remedy="look into it")
    def advice(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        raise error

    done = dg.materialize([served, advice])
    assert done.success
    [check] = done.get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description == f"could not be judged: {type(error).__name__}: wrong. Remedy: look into it."


def test_an_interruption_is_no_result() -> None:
    def interrupted() -> dg.AssetCheckResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(interrupted, "none")


def statistics(folder: Path, column: str) -> Artifact:
    """Statistics of a table with one column."""
    uri = str(folder / "statistics.json")
    distribution = {"count": 4, "missing": 0, "minimum": 0.0, "maximum": 1.0, "edges": [0.5], "counts": [2, 2]}
    storage.write_json(uri, {"distributions": {column: distribution}})
    return Artifact.of(str(folder), [file_info(uri, str(folder))])


def test_a_table_without_a_column_of_the_champion_is_explained(tmp_path: Path) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"))
    register(registry, statistics(tmp_path / "champion", "SQUARE_FEET"))
    registry.set_status("housing", 1, "Approved", who="ann", why="good")
    other = statistics(tmp_path / "split", "MILEAGE")
    split = SplitRef(rows=other, fraction=0.6, configured_fraction=0.6, statistics=other)
    feature_drift = functions()[dg.AssetCheckKey(dg.AssetKey("train_split"), "feature_drift")]
    result = feature_drift(split, registry)
    assert (result.passed, result.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "housing/1 was trained on another table: not one column in common" in result.description
    assert result.metadata["columns"].value == "MILEAGE"


def test_nothing_to_compare_is_no_error() -> None:
    assert stability_result({}, "housing/1", {}).passed
