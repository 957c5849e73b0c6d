"""Whether jobs and endpoints that run in AWS's image get all that they import. `make rehearse IMAGE=aws` runs them."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import re
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from resources.aws.code_package import ARCHIVE, REQUIRED, code_package, requirements
from resources.compute.sagemaker import STEPS
from resources.model_registry.package_files import SERVING_PACKAGES, serving_code
from step_scripts.runner.code_version import _sources, step_sources
from tests import ROOT
from tests.aws_image import CONTENT

PROJECT = ("step_scripts", "housing_assets")
PACKAGES = importlib.metadata.packages_distributions()
PARTS = {"botocore": "boto3"}  # packages that never come without another


def test_jobs_get_the_modules_and_packages_that_they_import() -> None:
    modules = set[str]().union(*(step_sources(step) for step in STEPS))
    content = code_package(PROJECT)[ARCHIVE]
    assert not modules - members(content)
    assert distributions(modules) == set(REQUIRED)


def test_endpoints_get_the_modules_and_packages_that_they_import() -> None:
    modules = set(_sources("inference"))
    assert not modules - members(serving_code())
    # `local_files` imports filelock where a lock is taken, which no endpoint does.
    assert distributions(modules) - names(CONTENT) - names(requirements(SERVING_PACKAGES).split()) == {"filelock"}


def members(content: bytes) -> set[str]:
    """The modules in an archive."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = [Path(name) for name in archive.getnames() if name.endswith(".py")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files}


def distributions(modules: Iterable[str]) -> set[str]:
    """Names of the distributions that the project's modules import, wherever in them, directly."""
    found: set[str] = set()
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    packages = found - sys.stdlib_module_names - {*PROJECT}
    return names(PARTS.get(package) or PACKAGES.get(package, [package])[0] for package in packages)


def names(requirements: Iterable[str]) -> set[str]:
    """Distributions, named as registries name them."""
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}
