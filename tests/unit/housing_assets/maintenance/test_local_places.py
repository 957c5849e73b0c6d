"""What `make run`, `make ui` and `make clean-data` write and remove, and what they leave alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from housing_assets.deployments import load_resources
from housing_assets.local_places import MARKER, main
from resources.feature_store.local import LocalFeatureStore
from tests import ROOT
from tests.feature_rows import TABLE

HISTORY = ("history/runs/1.db", "storage/1/log", "schedules/schedules.db", "dagster.yaml", MARKER)


def environment(folder: Path) -> dict[str, str]:
    return {"HOUSING_ROOT": str(folder / "housing data"), "DAGSTER_HOME": str(folder / "dagster home")}


def write(*files: Path, text: str = "x") -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def group_in(root: str) -> None:
    """A feature group: what the project has made."""
    store: LocalFeatureStore = load_resources({"HOUSING_ROOT": root})["feature_store"]
    store.ensure_group("sales", TABLE)


def test_folders_that_were_made_go_with_all_that_is_in_them(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    assert main(["prepare"], variables) == 0
    home, root = Path(variables["DAGSTER_HOME"]), Path(variables["HOUSING_ROOT"])
    assert (home / "dagster.yaml").read_bytes() == (ROOT / "deploy" / "dagster.yaml").read_bytes()
    write(*(home / name for name in HISTORY[:3]))
    group_in(str(root))
    load_resources({**variables, "HOUSING_ENVIRONMENT": "staging"})["source_location"].resolve()
    assert (root / "environments" / "staging" / "sample").is_dir()

    assert main(["clean"], variables) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["clean"], variables) == 0, "there is nothing to do, which is no failure"


def test_what_others_keep_in_the_same_folders_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables = environment(tmp_path)
    home, root = Path(variables["DAGSTER_HOME"]), Path(variables["HOUSING_ROOT"])
    theirs = [home / "history/runs/1.db", home / "dagster.yaml", root / "notes.txt", root / "artifacts/notes.txt",
              root / "artifacts/mine/notes/1.txt", tmp_path / "housing" / "notes.txt"]  # fmt: skip
    write(*theirs, text="mine")
    assert main(["prepare"], variables) == 0
    assert "is kept; it differs" in capsys.readouterr().err
    group_in(str(root))

    assert main(["clean"], variables) == 1
    said = capsys.readouterr()
    assert f"{home} (DAGSTER_HOME) was not made by this project" in said.err
    assert "artifacts, notes.txt" in said.out
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(theirs)
    assert {p.read_text() for p in theirs} == {"mine"}

    # Of a folder that was made by the project, what others have put there since stays as well.
    (home / MARKER).touch()
    write(home / "own.txt")
    assert main(["clean"], variables) == 0
    assert {p.name for p in home.iterdir()} == {MARKER, "own.txt"}


def test_a_home_without_configuration_that_others_have_made_gets_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = environment(tmp_path)
    write(Path(variables["DAGSTER_HOME"]) / "history" / "1.db")
    assert main(["prepare"], variables) == 0
    assert "is used as it is" in capsys.readouterr().err
    assert not (Path(variables["DAGSTER_HOME"]) / "dagster.yaml").exists()


def test_what_is_on_aws_is_left_to_teardown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables = environment(tmp_path) | {"HOUSING_DEPLOYMENT": "sagemaker", "HOUSING_ROOT": "s3://bucket/housing"}
    assert main(["clean"], variables) == 1
    assert "launch the job teardown" in capsys.readouterr().err
    assert main(["clean"], environment(tmp_path) | {"HOUSING_ROOT": "s3://bucket/housing"}) == 1
    assert "nothing was removed: HOUSING_ROOT='s3://bucket/housing'" in capsys.readouterr().err


def test_make_quotes_the_places(tmp_path: Path) -> None:
    """The recipes themselves, in a project whose environment is this one."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    write(*(tmp_path / name for name in ("pyproject.toml", "constraints.txt", ".venv/.installed")))
    places = {"HOUSING_ROOT": str(tmp_path / "work old" / "housing"), "DAGSTER_HOME": str(tmp_path / "my home")}
    theirs = tmp_path / "work" / "thesis.txt"
    write(theirs)
    variables = {**os.environ, **places, "PYTHONPATH": str(ROOT)}

    def make(*targets: str) -> str:
        done = subprocess.run(
            ["make", f"BIN={Path(sys.executable).parent}", *targets],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    subprocess.run([sys.executable, "-m", "housing_assets.local_places", "prepare"], env=variables, check=True)
    group_in(places["HOUSING_ROOT"])
    assert "removed 1 of 1 thing" in make("stop", "clean-data")
    assert theirs.exists()
    assert not Path(places["HOUSING_ROOT"]).exists()
    assert not Path(places["DAGSTER_HOME"]).exists()
