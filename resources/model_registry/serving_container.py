"""The container that serves a model: a custom image, or AWS's XGBoost image with the project's code.

A custom image (see the `Dockerfile`) holds the code and answers `serve`. AWS's image has a server of its own, which
imports a module named by `SAGEMAKER_PROGRAM` from the archive at `SAGEMAKER_SUBMIT_DIRECTORY`, after installing the
archive and its `requirements.txt`: such endpoints need a package index to start.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resources.aws.code_package import archive, job_image
from step_scripts.runner import storage

PROGRAM = "inference.py"
# The container's name and its model's digest, which the server shows, and checks before it serves.
VERSION_VARIABLE, DIGEST_VARIABLE = "HOUSING_MODEL_VERSION", "HOUSING_MODEL_DIGEST"
# What serving imports and AWS's image lacks, or has in another version. XGBoost and NumPy stay the image's.
_REQUIRED = ("polars", "pyarrow", "pydantic")
_STEP_SCRIPTS = Path(__file__).parents[2] / "step_scripts"
_SETUP = b"""from setuptools import find_packages, setup

setup(name="housing-serving", version="1", py_modules=["inference"], packages=find_packages())
"""


def serving_container(image: str | None, region: str, code_root: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """`Image` and `Environment` of the container. For AWS's image the code is put below `code_root` first.

    Raises `dagster.Failure` if AWS's image is wanted and cannot be known.
    """
    if image:
        return {"Image": image, "Environment": dict(environment)}
    found = job_image(None, region)
    code = serving_code()
    uri = storage.join(code_root, hashlib.sha256(code).hexdigest()[:16], "sourcedir.tar.gz")
    if not storage.exists(uri):
        storage.write_bytes(uri, code)
    script = {"SAGEMAKER_PROGRAM": PROGRAM, "SAGEMAKER_SUBMIT_DIRECTORY": uri, "SAGEMAKER_REGION": region}
    return {"Image": found, "Environment": {**script, **environment}}


def serving_requirements() -> str:
    """One `name==version` a line, with the versions installed here: what AWS's server installs before it serves."""
    return "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in _REQUIRED)


def serving_code() -> bytes:
    """The archive for AWS's image: the module that its server imports, `step_scripts`, and pinned requirements."""
    files = {
        path.relative_to(_STEP_SCRIPTS.parent).as_posix(): path.read_bytes() for path in _STEP_SCRIPTS.rglob("*.py")
    }
    return archive(
        {
            **files,
            PROGRAM: (_STEP_SCRIPTS / PROGRAM).read_bytes(),
            "setup.py": _SETUP,
            "requirements.txt": serving_requirements().encode(),
        }
    )
