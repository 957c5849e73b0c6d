"""What AWS's XGBoost image runs: its server imports `inference` from the archive and calls its functions."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

from resources.aws.code_package import requirements
from resources.model_registry.package_files import SERVING_PACKAGES, serving_code, serving_container
from step_scripts.inference import model_fn, transform_fn
from step_scripts.model import load_model
from step_scripts.runner.contract import Artifact, DamagedArtifactError
from step_scripts.serving.served_model import ServedModel
from tests.aws_image import CONTENT
from tests.serving_models import house_rows, small_model

ROOT = Path(__file__).parents[4]
# As the image's server does it: a module imported by name, `model_fn` once, `transform_fn` as the view of a request.
TOOLKIT = """
import sys
sys.path[:0] = [sys.argv[1]]
import flask, importlib, json, step_scripts
user = importlib.import_module("inference")
assert user.__file__.startswith(sys.argv[1]) and step_scripts.__file__.startswith(sys.argv[1])
model = user.model_fn(sys.argv[2])
app = flask.Flask("worker")

@app.route("/invocations", methods=["POST"])
def invocations():
    request = flask.request
    text = request.content_type in ("text/csv", "application/json")
    result = user.transform_fn(model, request.get_data(as_text=text), request.content_type, request.headers["Accept"])
    return app.response_class(result[0], mimetype=result[1]) if isinstance(result, tuple) else result

client = app.test_client()
for body, kind in json.loads(sys.argv[3]):
    answer = client.post("/invocations", data=body, content_type=kind, headers={"Accept": "application/json"})
    print(json.dumps([answer.status_code, answer.mimetype, answer.get_json()]))
"""


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return small_model(tmp_path / "model")


def test_answers_are_those_of_the_model(model: Artifact) -> None:
    rows = house_rows(4)
    loaded = model_fn(model.uri)
    assert isinstance(loaded, ServedModel)
    body, media = transform_fn(loaded, rows.write_csv(), "text/csv", "text/csv")
    assert media == "text/csv"
    assert [float(line) for line in body.split()] == load_model(model.uri).predict(rows).tolist()


def test_another_model_than_the_deployed_one_is_refused(model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOUSING_MODEL_DIGEST", model.digest)
    assert model_fn(model.uri).record.model.digest == model.digest
    monkeypatch.setenv("HOUSING_MODEL_DIGEST", "0" * 64)
    with pytest.raises(DamagedArtifactError, match=f"holds model {model.digest}, not the deployed one, 0000"):
        model_fn(model.uri)


def test_the_archive_is_all_that_the_server_needs(model: Artifact, tmp_path: Path) -> None:
    assert serving_code() == serving_code()
    with tarfile.open(fileobj=io.BytesIO(serving_code())) as archive:
        assert {"inference.py", "setup.py", "requirements.txt"} <= set(archive.getnames())
        archive.extractall(tmp_path / "code", filter="data")
    rows = house_rows(2)
    requests = [
        (rows.write_csv(), "text/csv"),
        (json.dumps({"instances": rows.to_dicts()}), "application/json"),
        ("old,2500,3,2.0,0.5,2,1,0", "text/csv"),
        ("1", "image/png"),
        ("", "text/csv"),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", TOOLKIT, str(tmp_path / "code"), model.uri, json.dumps(requests)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    predictions = {"predictions": load_model(model.uri).predict(rows).tolist()}
    assert answers[:2] == [[200, "application/json", predictions]] * 2
    assert [status for status, _, _ in answers[2:]] == [400, 415, 400]
    assert answers[2][2]["rows"][0]["column"] == "YEAR_BUILT"


def test_what_is_imported_is_in_the_archive_or_the_image() -> None:
    """Of all modules of this project that the image's server loads."""
    code = "import sys, step_scripts.inference\n"
    code += "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('step_scripts')))"
    files = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    imported: set[str] = set()
    for file in files:
        for statement in ast.parse(Path(file).read_text()).body:
            if isinstance(statement, ast.Import):
                imported |= {alias.name for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom) and statement.module:
                imported.add(statement.module)
    modules = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"step_scripts"}
    stated = {line.partition("==")[0].lower() for line in (*requirements(SERVING_PACKAGES).split(), *CONTENT)}
    assert {"numpy", "polars", "pydantic"} <= modules <= stated


def test_an_own_image_needs_no_code(tmp_path: Path) -> None:
    container = serving_container("own:1", "us-east-1", str(tmp_path), {"A": "b"})
    assert container == {"Image": "own:1", "Environment": {"A": "b"}}
    assert list(tmp_path.iterdir()) == []


def test_the_image_of_aws_gets_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, core = types.ModuleType("sagemaker.core.image_uris"), types.ModuleType("sagemaker.core")
    images.retrieve = lambda framework, region, **_: f"{framework}.{region}"  # pyright: ignore[reportAttributeAccessIssue]
    core.image_uris = images  # pyright: ignore[reportAttributeAccessIssue]
    for module in (types.ModuleType("sagemaker"), core, images):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    container = serving_container(None, "region-of-this-test", str(tmp_path), {"A": "b"})
    uri = container["Environment"].pop("SAGEMAKER_SUBMIT_DIRECTORY")
    assert Path(uri).read_bytes() == serving_code()
    assert container == {
        "Image": "xgboost.region-of-this-test",
        "Environment": {"SAGEMAKER_PROGRAM": "inference.py", "SAGEMAKER_REGION": "region-of-this-test", "A": "b"},
    }
