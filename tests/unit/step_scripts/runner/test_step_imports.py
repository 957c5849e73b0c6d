"""What the steps import, and what they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

STEPS = sorted(f"step_scripts.{path.stem}" for path in (ROOT / "step_scripts").glob("[!_]*.py"))


def _python(script: str, folder: Path, scikit_learn: str) -> str:
    """Output and errors of `script`, where a package `sklearn` with that content is installed."""
    package = folder / "sklearn"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(scikit_learn)
    path = os.pathsep.join([str(folder), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout + result.stderr


# Not an ImportError, which XGBoost would take for "not installed".
IMPORTED = "raise RuntimeError('scikit-learn was imported')\n"


@pytest.mark.parametrize(
    "modules",
    [
        STEPS,
        ["step_scripts.training.search_trials"],
        ["step_scripts.training.engine_ray_train"],
        ["step_scripts.serving.served_model"],
    ],
    ids=["all", "trials", "final fit", "server"],
)
def test_scikit_learn_is_installed_and_no_step_imports_it(modules: list[str], tmp_path: Path) -> None:
    script = f"import importlib\nfor module in {modules!r}: importlib.import_module(module)\nprint('imported')"
    assert _python(script, tmp_path, IMPORTED).endswith("imported\n")


def test_xgboost_alone_would_import_scikit_learn(tmp_path: Path) -> None:
    """Else `import xgboost` can stand in every module."""
    assert "scikit-learn was imported" in _python("import xgboost", tmp_path, IMPORTED)


def test_scikit_learn_can_be_imported_after_a_step(tmp_path: Path) -> None:
    script = "import step_scripts.model; import sklearn"
    assert "scikit-learn was imported" in _python(script, tmp_path, IMPORTED)


def test_scikit_learn_that_was_imported_before_is_kept(tmp_path: Path) -> None:
    # XGBoost then finds this package incomplete, and goes on without it.
    script = "import sklearn; import step_scripts.model; import sklearn; print(sklearn.name)"
    assert _python(script, tmp_path, "name = 'mine'\n") == "mine\n"
