"""What jobs get: an image, and the project's code as a source archive, pinned requirements and a start script.

The archive depends on the sources alone (no times, no owners), so its digest names it on S3, and it is uploaded once.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.metadata
import importlib.resources
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import dagster as dg

from step_scripts.runner import storage
from step_scripts.runner.code_version import file_of, step_sources

XGBOOST_IMAGE_VERSION = "3.2-0"  # XGBoost 3.2.0, which the project pins; Python 3.12; no Ray
ARCHIVE, REQUIREMENTS, BOOTSTRAP = "source.tar.gz", "requirements.txt", "bootstrap.sh"
# What steps import. The versions are those of the Dagster process, so that both sides of a job agree.
REQUIRED = {
    "boto3": "",
    "dagster-pipes": "",
    "filelock": "",
    "numpy": "",
    "optuna": "",
    "pandas": "",
    "polars": "",
    "psutil": "",
    "pyarrow": "",
    "pydantic": "",
    "pyiceberg": "[glue]",
    "ray": "[data,train,tune]",
    "tenacity": "",
    "threadpoolctl": "",
    "xgboost": "",
    "xgboost-ray": "",
}
_SUFFIXES = (".py", ".sh")


def upload(package: Mapping[str, bytes], code_root: str) -> str:
    """Put a package's files below `<code_root>/<digest>/` unless they are there. Returns that URI, ending with a slash.

    The digest: the first 16 digits of the SHA-256 over all files.
    """
    digest = hashlib.sha256()
    for name, content in sorted(package.items()):
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\0".encode())
    uri = storage.join(code_root, digest.hexdigest()[:16])
    present = storage.sizes(uri, list(package))
    for name in package.keys() - present.keys():
        storage.write_bytes(storage.join(uri, name), package[name])
    return f"{uri}/"


def code_package(packages: Iterable[str], steps: Iterable[str] = ()) -> dict[str, bytes]:
    """Files by name: sources of whole packages and of all that these steps load, pinned requirements, the start script.

    Raises `FileNotFoundError` for a step that is not there.
    """
    sources: dict[str, Path] = {}
    for package in packages:
        folder = Path(str(importlib.resources.files(package)))
        for path in folder.rglob("*"):
            if path.suffix in _SUFFIXES and "__pycache__" not in path.parts:
                sources[f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    for module in {module for step in steps for module in step_sources(step)}:
        if (path := file_of(module)) is not None:
            parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
            sources["/".join([*parent.split("."), path.name]).lstrip("/")] = path
    return {
        ARCHIVE: archive({name: path.read_bytes() for name, path in sources.items()}),
        REQUIREMENTS: requirements().encode(),
        BOOTSTRAP: importlib.resources.files("step_scripts").joinpath(BOOTSTRAP).read_bytes(),
    }


def archive(files: dict[str, bytes]) -> bytes:
    """A .tar.gz of the files; the same bytes for the same content, whenever and wherever it is made."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as opened,
    ):
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, 0
            opened.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def requirements(packages: Mapping[str, str] = REQUIRED) -> str:
    """One `name[extras]==version` a line, with the versions installed here. `packages`: names and their extras."""
    return "".join(f"{name}{extra}=={importlib.metadata.version(name)}\n" for name, extra in packages.items())


@functools.cache
def job_image(configured: str | None, region: str) -> str:
    """URI of the image: the configured one, or AWS's XGBoost image of the region.

    Raises `dagster.Failure` if it cannot be known, with what to do.
    """
    if configured:
        return configured
    try:
        from sagemaker.core import image_uris  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise dg.Failure(
            "no image is configured, and the package that knows AWS's images is not there: "
            "pip install 'housing-assets[sagemaker]', or configure a custom image, built from the Dockerfile",
            allow_retries=False,
        ) from error
    try:
        return image_uris.retrieve("xgboost", region, version=XGBOOST_IMAGE_VERSION, image_scope="training")
    except ValueError as error:
        raise dg.Failure(
            f"there is no XGBoost image {XGBOOST_IMAGE_VERSION} for {region}: {error}. Configure a custom image",
            allow_retries=False,
        ) from error
