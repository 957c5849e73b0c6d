"""S3 as the platform uses it: channels in, artifacts out, directories kept in step."""

import json
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.sagemaker_emulator.common import split_s3_uri

# Requests with access keys that begin so are the platform's own; faults leave them alone.
INTERNAL_KEY = "EMULATORINTERNAL"


class InputError(RuntimeError):
    """Input data that cannot be had; the text becomes the job's failure reason."""


class Storage:
    """S3 operations of the platform, through the emulator's own endpoint."""

    def __init__(self, endpoint: str, region: str, access_key: str) -> None:
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=region,
            aws_access_key_id=access_key,
            aws_secret_access_key="internal",
            config=Config(retries={"max_attempts": 2}, max_pool_connections=50),
        )

    def keys(self, uri: str) -> list[str]:
        """Keys under a prefix, in S3's order; 'directory' markers left out."""
        bucket, prefix = split_s3_uri(uri)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]

    def download(
        self, uri: str, data_type: str, targets: Sequence[Path], sharded: bool = False, required: bool = True
    ) -> None:
        """Download an input to every target directory, or share its objects out among them."""
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
        try:
            objects = self._manifest(uri) if data_type == "ManifestFile" else self._prefix(uri)
        except ClientError as error:
            raise InputError(_describe(error, uri)) from error
        if not objects and required:
            raise InputError(
                f'ClientError: No S3 objects found under S3 URL "{uri}" given in input data source. '
                "Please ensure that the bucket exists in the selected region and that objects exist under that prefix."
            )
        for index, (bucket, key, relative) in enumerate(objects):
            receivers = [targets[index % len(targets)]] if sharded else targets
            self._fetch(bucket, key, [_inside(target, relative) for target in receivers])

    def upload_file(self, path: Path, uri: str) -> None:
        """Upload one file."""
        bucket, key = split_s3_uri(uri)
        self.client.upload_file(str(path), bucket, key)

    def put(self, uri: str, body: bytes) -> None:
        """Write one object."""
        bucket, key = split_s3_uri(uri)
        self.client.put_object(Bucket=bucket, Key=key, Body=body)

    def get(self, uri: str) -> bytes:
        """Read one object."""
        bucket, key = split_s3_uri(uri)
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def upload_tree(self, directory: Path, uri: str) -> None:
        """Upload every file below a directory."""
        for path in files_below(directory):
            self.upload_file(path, f"{uri.rstrip('/')}/{path.relative_to(directory).as_posix()}")

    def upload_archive(self, directories: Iterable[Path], uri: str) -> None:
        """Upload the contents of several hosts' directories as one .tar.gz; of equal names the first host's wins."""
        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
                seen: set[Path] = set()
                for directory in directories:
                    for path in sorted(directory.rglob("*")):
                        relative = path.relative_to(directory)
                        if relative not in seen:
                            seen.add(relative)
                            archive.add(path, arcname=relative.as_posix(), recursive=False)
            file.seek(0)
            bucket, key = split_s3_uri(uri)
            self.client.upload_fileobj(file, bucket, key)

    def _fetch(self, bucket: str, key: str, paths: Sequence[Path]) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        if paths:
            self.client.download_file(bucket, key, str(paths[0]))
            for path in paths[1:]:
                shutil.copyfile(paths[0], path)

    def _prefix(self, uri: str) -> list[tuple[str, str, str]]:
        bucket, prefix = split_s3_uri(uri)
        return [(bucket, key, _relative(prefix, key)) for key in self.keys(uri)]

    def _manifest(self, uri: str) -> list[tuple[str, str, str]]:
        try:
            first, *rest = json.loads(self.get(uri))
            bucket, prefix = split_s3_uri(first["prefix"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"ClientError: the manifest {uri} is not a SageMaker manifest: {error}") from error
        return [(bucket, prefix + name, name) for name in rest]


class Mirror:
    """Keeps an S3 prefix in step with a directory: uploads what is new or changed since the last pass."""

    def __init__(self, storage: Storage, directory: Path, uri: str) -> None:
        self._storage = storage
        self._directory = directory
        self._uri = uri.rstrip("/")
        self._seen: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def remember(self) -> None:
        """Take what is there now as uploaded; for restored files."""
        for path in files_below(self._directory):
            self._seen[path] = _version(path)

    def sync(self) -> None:
        """One pass."""
        with self._lock:
            for path in files_below(self._directory):
                try:
                    version = _version(path)
                    if self._seen.get(path) == version:
                        continue
                    relative = path.relative_to(self._directory).as_posix()
                    self._storage.upload_file(path, f"{self._uri}/{relative}")
                except FileNotFoundError:
                    continue
                self._seen[path] = version


def files_below(directory: Path) -> list[Path]:
    """Regular files below a directory, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def unpack_archive(archive: bytes, directory: Path) -> None:
    """Unpack a model.tar.gz; refuses members that would leave the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as file:
        file.write(archive)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:*") as opened:
            opened.extractall(directory, filter="data")


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _relative(prefix: str, key: str) -> str:
    """Name of an object below a channel's directory."""
    rest = key[len(prefix) :]
    if not rest:
        return key.rsplit("/", 1)[-1]
    if prefix.endswith("/") or rest.startswith("/") or not prefix:
        return rest.lstrip("/")
    return prefix.rsplit("/", 1)[-1] + rest


def _inside(directory: Path, relative: str) -> Path:
    if ".." in PurePosixPath(relative).parts:
        raise InputError(f"ClientError: the object name {relative!r} would leave the input directory")
    return directory / relative


def _describe(error: ClientError, uri: str) -> str:
    details = error.response.get("Error", {})
    return f"ClientError: {details.get('Message', error)} ({details.get('Code', '?')}) for {uri}"
