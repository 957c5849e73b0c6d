"""The version of a step's code: what counts, and that a step does not run with other code than what was asked for."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from housing_assets.sample_data import write_sample
from housing_assets.schema import HOUSING_TABLE
from step_scripts.runner import code_version, execution
from step_scripts.runner.code_version import (
    NodeReport,
    library_versions,
    module_version,
    own_places,
    step_sources,
    step_version,
    version_of,
)
from step_scripts.runner.contract import Artifact, StepError, StepRequest, StepResult
from step_scripts.runner.execution import CodeCheck, find_result, require_unchanged, run_step
from step_scripts.runner.ray_session import RaySession, RaySettings
from tests import ROOT
from tests.source_steps import CollectingReporter, source_file


def forget() -> None:
    """As in a new process."""
    for function in (code_version.file_of, code_version._read, step_sources, own_places):
        function.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], Path]]:
    """Writes modules of packages that are found first, and are not installed."""

    def write(sources: dict[str, str]) -> Path:
        for name, text in sources.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    forget()
    yield write
    forget()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("shop", "tables"):
            del sys.modules[name]
            code_version._loaded.pop(name, None)


EVERY_WAY = {
    "shop/__init__.py": "",
    "shop/step.py": """
import os, numpy, shop.plain
from shop.attribute import (
    x,  # a comment, with a comma
    y,
)
from shop import (
    module,
    other as renamed,
)
from .relative import x
from . import \\
    sibling
from tables.cars import TABLE
if True: import shop.one_line
ENGINES = {"a": "shop.engines.by_name"}
COMMAND = ["-m", 'shop.child']
def later():
    import shop.lazy
    import importlib
    importlib.import_module("bare_module")
    __import__("shop.called")
    from shop.deep import inner
NOTHING = ("data.csv", "shop.nothing")
""",
    "bare_module.py": "",
    "data/readme.txt": "",
    "tables/cars.py": "from tables import wheels",  # without an __init__
    "tables/wheels.py": "",
    "shop/deep/__init__.py": "",
    "shop/deep/inner.py": "from ..indirect import x",
    "shop/engines/__init__.py": "",
    **{
        f"shop/{name}.py": ""
        for name in ("plain", "attribute", "module", "other", "relative", "sibling", "one_line", "child", "lazy",
                     "called", "indirect", "engines/by_name")
    },
}  # fmt: skip
UNRELATED = {"shop/unrelated.py": "", "shop/csv.py": "", "tables/bikes.py": ""}


def test_a_version_changes_with_every_way_of_loading_a_module(package: Callable[[dict[str, str]], Path]) -> None:
    root = package(EVERY_WAY | UNRELATED)
    version = module_version("shop.step")
    for name in EVERY_WAY | UNRELATED:
        if not name.endswith(".py"):
            continue
        text = (root / name).read_text()
        (root / name).write_text(text + "# changed\n")
        forget()
        assert (module_version("shop.step") != version) == (name in EVERY_WAY), name
        (root / name).write_text(text)
    forget()
    assert module_version("shop.step") == version
    assert not {"numpy", "os"} & code_version._sources("shop.step").keys()


def test_what_runs_a_step_is_part_of_its_version() -> None:
    for step in ("validate_source", "tests.probe_step"):
        runner = {f"runner.{name}" for name in ("execution", "worker", "ray_session", "storage", "code_version")}
        assert {f"step_scripts.{name}" for name in {*runner, "cluster.head"}} < step_sources(step).keys()
    assert "step_scripts.tune_trial" in step_sources("tune_model"), "SageMaker's tuning jobs run it"
    assert "step_scripts.data.csv_fragments" not in step_sources("tune_model"), "else nothing could be reused"
    assert step_version("tune_model") != step_version("evaluate_model")
    for name in ("nothing", "shop.nothing"):
        with pytest.raises(FileNotFoundError, match=f"no module .*{name}"):
            step_version(name)


DRIVER = """
import json, sys
import step_scripts.runner.worker
from step_scripts.runner.contract import StepRequest
from step_scripts.runner.ray_session import RaySession, RaySettings
from step_scripts.runner.execution import PrintReporter, run_step
request = StepRequest.model_validate_json(sys.stdin.read())
session = RaySession(RaySettings(address=sys.argv[1], ship_code=False))
result = run_step(request, PrintReporter(), session)
print(json.dumps([result.model_dump(mode="json"), [name for name in sys.modules if name.startswith("step_scripts")]]))
"""


@pytest.mark.slow
def test_every_file_that_a_step_loads_while_it_runs_changes_its_version(
    ray_session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step in a driver process of its own, the workers of which are new; on a copy, each file is changed."""
    address, journal = ray.get_runtime_context().gcs_address, ray_session.journal
    assert journal is not None
    loaded: dict[str, set[str]] = {}

    def run(step: str, inputs: dict[str, Artifact], **params: Any) -> dict[str, Artifact]:
        start = journal.stat().st_size if journal.exists() else 0
        request = StepRequest(
            step=step, params={"table": HOUSING_TABLE.model_dump(mode="json"), **params}, inputs=inputs,
            output_root=str(tmp_path / "out"), code_version=step_version(step), sources=dict(step_sources(step)),
            environment=library_versions(),
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, address], input=request.model_dump_json(), cwd=ROOT, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        manifest, modules = json.loads(done.stdout.splitlines()[-1])
        in_workers = {module for module, _ in code_version.read_journal(journal, start)}
        assert in_workers
        loaded.setdefault(step, set()).update(in_workers, modules)
        result = StepResult.model_validate(manifest)
        assert result.unversioned == []
        return result.outputs

    sample = write_sample(tmp_path / "sales.csv", rows=600)
    rows = run("validate_source", {}, files=[source_file(sample).model_dump(mode="json")])["rows"]
    target = {"root": str(tmp_path / "store")}
    features = run("ingest_features", {"rows": rows}, group="sales", target=target)["features"]
    splits = run("prepare_splits", {"features": features}, deduplicate=True)
    training = {name: splits[name] for name in ("train", "validation", "statistics")}
    short = {"num_trials": 2, "num_boost_round": 5, "early_stopping_rounds": 5}
    model = run("tune_model", training, engine="ray_train", **short)["model"]
    run("tune_model", training, engine="xgboost_ray", **short)
    run("evaluate_model", {"model": model, "train": splits["train"], "test": splits["test"]})

    engines = {
        "step_scripts.training.engine_ray_train",
        "step_scripts.training.engine_xgboost_ray",
        "step_scripts.training.search_trials",
    }
    assert engines < loaded["tune_model"]
    for step, modules in loaded.items():
        assert modules <= step_sources(step).keys()
    versions = {step: step_version(step) for step in loaded}
    copy = shutil.copytree(ROOT / "step_scripts", tmp_path / "step_scripts")
    monkeypatch.setattr(code_version, "own_places", lambda package: (copy,) if package == "step_scripts" else ())
    for module in sorted(set().union(*loaded.values())):
        place = copy.parent.joinpath(*module[module.index("step_scripts") :].split("."))
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        text = file.read_text()
        file.write_text(text + "# changed\n")
        forget()
        for step, modules in loaded.items():
            if module in modules:
                assert step_version(step) != versions[step], (step, module)
        file.write_text(text)
    forget()
    assert {step: step_version(step) for step in loaded} == versions
    monkeypatch.undo()
    forget()


STEP = """
import sys
from pathlib import Path
import ray
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepDefinition, StepOutcome, StepParams, file_info
class Params(StepParams):
    where: str
    swap: bool = False
def work(folder):
    import sys
    sys.path.insert(0, folder)
    import step_scripts
    from shop import late
    return late.VALUE
def run(context, params):
    late = Path(__file__).with_name("late.py")
    right = late.read_text()
    if params.swap:
        late.write_text("VALUE = 22")
    folder = str(late.parent.parent)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    value = work(folder) if params.where == "driver" else ray.get(ray.remote(work).remote(folder))
    late.write_text(right)
    uri = context.output_uri("value")
    storage.write_bytes(uri + "/value.txt", str(value).encode())
    return StepOutcome({"value": Artifact.of(uri, [file_info(uri + "/value.txt", uri)])})
STEP = StepDefinition(params=Params, run=run, outputs=("value",), uses_ray=False)
"""
SHOP = {"shop/__init__.py": "", "shop/step.py": STEP, "shop/late.py": "VALUE = 1"}


def asked_of(root: Path, **params: Any) -> StepRequest:
    sources = dict(step_sources("shop.step"))
    return StepRequest(
        step="shop.step", params=params, output_root=str(root / "out"), code_version=version_of(sources),
        sources=sources, environment=library_versions(),
    )  # fmt: skip


@pytest.mark.parametrize("where", ["driver", "worker"])
def test_code_that_changes_while_a_step_runs_is_not_stored_under_the_version_asked_for(
    where: str, package: Callable[[dict[str, str]], Path], request: pytest.FixtureRequest
) -> None:
    """It is changed before it is loaded, and restored when the step ends, as `git checkout` does."""
    session = RaySession(RaySettings()) if where == "driver" else request.getfixturevalue("ray_session")
    asked = asked_of(package(SHOP), where=where, swap=True)
    with pytest.raises(StepError, match=r"code of step shop.step has changed since .*: shop.late would be") as error:
        run_step(asked, CollectingReporter(), session)
    assert "reload the code location" in str(error.value)
    assert find_result(asked) is None
    assert not [path for path in Path(asked.output_uri).rglob("*") if path.is_file()]


def test_code_that_is_changed_without_being_loaded_does_no_harm(package: Callable[[dict[str, str]], Path]) -> None:
    root = package(SHOP)
    asked = asked_of(root, where="driver")
    importlib.import_module("shop.late")
    (root / "shop" / "late.py").write_text("VALUE = 3")
    result = run_step(asked, CollectingReporter(), RaySession(RaySettings()))
    assert Path(result.outputs["value"].file_uri("value.txt")).read_text() == "1"
    with pytest.raises(StepError, match=r"shop\.late would be"):
        require_unchanged(asked)  # of another process, which has yet to load it


def test_a_step_that_was_loaded_in_another_state_than_asked_for_is_refused(
    package: Callable[[dict[str, str]], Path],
) -> None:
    root = package(SHOP)
    asked = asked_of(root, where="driver")
    (root / "shop" / "step.py").write_text(STEP + "# changed\n")
    with pytest.raises(StepError, match=r"shop\.step would be, or were, other sources"):
        run_step(asked, CollectingReporter(), RaySession(RaySettings()))
    assert find_result(asked) is None


def test_a_module_that_no_file_names_makes_a_result_that_is_not_reused(
    package: Callable[[dict[str, str]], Path],
) -> None:
    hidden = {"shop/step.py": STEP.replace("from shop import late", 'late = __import__("sh" + "op.late").late')}
    asked = asked_of(package(SHOP | hidden), where="driver")
    reporter, unusable = CollectingReporter(), list[str]()
    assert run_step(asked, reporter, RaySession(RaySettings())).unversioned == ["shop.late"]
    assert find_result(asked, unusable.append) is None
    assert "its code version does not cover shop.late" in unusable[0]


@pytest.mark.parametrize("library", ["xgboost", "polars", "python"])
def test_other_libraries_are_another_request_and_are_refused_where_the_step_runs(
    library: str, package: Callable[[dict[str, str]], Path]
) -> None:
    here = asked_of(package(SHOP), where="driver")
    other = here.model_copy(update={"environment": {**here.environment, library: "0.1"}})
    assert other.digest != here.digest
    with pytest.raises(StepError, match=rf"other libraries than those asked for: {library} .*, asked for was 0\.1\."):
        run_step(other, CollectingReporter(), RaySession(RaySettings()))
    assert find_result(other) is None


def test_nodes_of_a_cluster_are_asked_for_their_code_and_libraries(
    ray_session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = RaySession(RaySettings(address=ray.get_runtime_context().gcs_address), is_started=True)
    [report] = joined.node_reports().values()
    assert report.libraries == library_versions()
    sources = step_sources("tune_model")
    assert len(report.sources.keys() & sources.keys()) > 30
    asked = StepRequest(step="tune_model", params={}, output_root="x", code_version="1", sources=dict(sources))
    CodeCheck(asked, joined).require()
    joined._reports = {
        "10.0.0.1": NodeReport({**report.sources, "step_scripts.training.engines": "0"}, report.libraries)
    }
    with pytest.raises(StepError, match=r"step_scripts\.training\.engines would be"):
        CodeCheck(asked, joined).require()
    asked = asked.model_copy(update={"environment": {"xgboost": "0.1"}})
    joined._reports = {"10.0.0.1": NodeReport({}, {"xgboost": "0.1"}), "10.0.0.2": report}
    monkeypatch.setattr(execution, "library_versions", lambda: {"xgboost": "0.1"})
    with pytest.raises(StepError, match=r"on Ray node 10\.0\.0\.2: xgboost .*, asked for was 0\.1"):
        CodeCheck(asked, joined).require()
