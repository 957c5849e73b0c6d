"""Files behind URIs: a local path, or `s3://bucket/prefix`. The same calls serve both, through Arrow's file systems.

What S3 can do and Arrow cannot is done by boto3, whose clients are made here: entity tags, deletion without folder
markers. Small objects are written atomically: a reader sees the old bytes or the new ones, never a part of them.
Whether a file has changed is seen without reading it, by `FileState`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from step_scripts.runner.local_files import FileState, file_named, local_state, private_folder, replacing
from step_scripts.runner.wording import counted

if TYPE_CHECKING:
    from pyarrow import fs

_ATTEMPTS = 10  # of one request, with exponential backoff: about a minute of throttling
_DELETED_AT_ONCE = 1000


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store and not a local path."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The local path that `uri` names. Raises `ValueError` for a remote one."""
    if is_remote(uri):
        raise ValueError(f"{uri} is not a local path")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    """`uri` extended by `parts`, with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Arrow's file system for `uri`, and the path in it. `AWS_ENDPOINT_URL` redirects S3 to another server."""
    from pyarrow import fs

    if not is_remote(uri):
        return fs.LocalFileSystem(), str(local_path(uri).absolute())
    scheme, _, path = uri.partition("://")
    if scheme not in ("s3", "s3a"):
        raise ValueError(f"{uri}: only local paths and s3:// URIs are supported")
    return _s3(_environment()), path


@functools.lru_cache(maxsize=8)
def _s3(environment: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    """One file system for each environment, so that connections are kept."""
    from pyarrow import fs

    return fs.S3FileSystem(
        region=region(),
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        # Arrow's own limit for connecting, one second, is too short for a busy machine.
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=10),
    )


def read_bytes(uri: str) -> bytes:
    """The whole content. Raises `FileNotFoundError`."""
    with open_plain(uri) as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write `data` atomically: locally by renaming a temporary file, on S3 because a put is atomic."""
    content = memoryview(data)  # fails before anything is written: Arrow would store a part
    with open_output(uri) if is_remote(uri) else replacing(local_path(uri)) as file:
        file.write(content)


def write_json(uri: str, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, default=str).encode())


def upload(file: Path, uri: str) -> None:
    """Copy a local file to `uri` on S3, in pieces. If that fails, nothing is changed at `uri`."""
    bucket, key = split_uri(uri)
    service_client("s3").upload_file(str(file), bucket, key)


def open_input(uri: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A seekable binary file open for reading. Raises `FileNotFoundError`."""
    filesystem_, path = filesystem(uri)
    return filesystem_.open_input_file(path)  # pyright: ignore[reportReturnType]  # NativeFile is like a file of Python


def open_plain(uri: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """As `open_input`, but local files without Arrow, which takes a while to import."""
    return open_input(uri) if is_remote(uri) else local_path(uri).open("rb")


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[IO[bytes]]:
    """A binary stream open for writing; parent folders are made. Not atomic: commit by a manifest."""
    filesystem_, path = filesystem(uri)
    if not is_remote(uri):
        private_folder(Path(path).parent)
    naming = contextlib.nullcontext() if is_remote(uri) else file_named(Path(path))
    # Without `compression` Arrow compresses what goes into a file whose name ends with .gz.
    with naming, filesystem_.open_output_stream(path, compression=None) as stream:
        yield stream  # pyright: ignore[reportReturnType]


def exists(uri: str) -> bool:
    """Whether a file or a non-empty prefix stands at `uri`."""
    from pyarrow import fs

    filesystem_, path = filesystem(uri)
    return filesystem_.get_file_info(path).type != fs.FileType.NotFound


def list_files(uri: str) -> list[str]:
    """URIs of all files below `uri`, sorted; empty if there is nothing."""
    return [join(uri, path) for path, _, _ in list_details(uri)]


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; empty if there is nothing."""
    return sorted(info.base_name for info in _listed(uri, recursive=False) if not info.is_file)


def list_details(uri: str) -> list[tuple[str, int, float]]:
    """All files below `uri`: path relative to it, size in bytes, time of modification in seconds since 1970."""
    _, root = filesystem(uri)
    return sorted(
        (info.path.removeprefix(root.rstrip("/") + "/"), info.size or 0, (info.mtime_ns or 0) / 1e9)
        for info in _listed(uri)
        if info.is_file
    )


def _listed(uri: str, *, recursive: bool = True) -> list[fs.FileInfo]:
    from pyarrow import fs

    filesystem_, path = filesystem(uri)
    return filesystem_.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))


def sizes(uri: str, paths: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes of the files at `paths` below `uri`; those that are missing are left out. On S3 one listing."""
    if is_remote(uri):
        wanted = set(paths)
        return {path: size for path, size, _ in list_details(uri) if path in wanted} if wanted else {}
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found[path] = local_path(join(uri, path)).stat().st_size
    return found


def delete_file(uri: str) -> None:
    """Remove the file at `uri`; nothing happens if there is none. Raises `OSError`."""
    if is_remote(uri):
        folder, _, name = uri.rpartition("/")
        delete_files(folder, [name])
    else:
        local_path(uri).unlink(missing_ok=True)


def delete_files(uri: str, paths: Sequence[str]) -> None:
    """Remove the files at `paths` below `uri`; missing ones are ignored. Raises `OSError`."""
    if not is_remote(uri):
        for path in paths:
            local_path(join(uri, path)).unlink(missing_ok=True)
        return
    bucket, key = split_uri(uri)
    for start in range(0, len(paths), _DELETED_AT_ONCE):
        chosen = [{"Key": f"{key.rstrip('/')}/{path}"} for path in paths[start : start + _DELETED_AT_ONCE]]
        with _os_errors(uri):
            answer = service_client("s3").delete_objects(Bucket=bucket, Delete={"Objects": chosen, "Quiet": True})
        if errors := answer.get("Errors"):
            first = errors[0]
            raise OSError(
                f"{counted(len(errors), 'object')} below {uri} could not be deleted, the first is {first.get('Key')}: "
                f"{first.get('Code')} {first.get('Message')}. Allow s3:DeleteObject for this prefix"
            )


def delete_folder(uri: str) -> None:
    """Remove everything below `uri`, on S3 with folder markers; nothing happens if there is nothing.

    Raises `OSError`; `ValueError` for a whole bucket.
    """
    if is_remote(uri):
        if not split_uri(uri)[1].strip("/"):
            raise ValueError(f"{uri} is a bucket")
        delete_files(uri, [path for path, _ in _objects(uri)])
    elif (folder := local_path(uri)).is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def file_state(uri: str) -> FileState:
    """The state of the file at `uri` now. Raises `FileNotFoundError`, or `OSError` if it cannot be asked for."""
    if not is_remote(uri):
        return local_state(local_path(uri).stat())
    bucket, key = split_uri(uri)
    with _os_errors(uri):
        found = service_client("s3").head_object(Bucket=bucket, Key=key)
    return _object_state(found["ContentLength"], found)


def object_states(uri: str, *, deep: bool = True) -> Iterator[tuple[str, FileState]]:
    """Path below a prefix on S3 and state of each object there, without folder markers. Raises `OSError`.

    Unless `deep`, without the objects in folders below the prefix.
    """
    for path, item in _objects(uri, **({} if deep else {"Delimiter": "/"})):
        if not item["Key"].endswith("/"):
            yield path, _object_state(item["Size"], item)


def _object_state(size: int, found: Mapping[str, Any]) -> FileState:
    return FileState(size, found["LastModified"].timestamp(), found["ETag"].strip('"'))


def _objects(uri: str, **options: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path below a prefix on S3 and description of each object there, folder markers included. Raises `OSError`."""
    bucket, key = split_uri(uri.rstrip("/"))
    prefix = f"{key}/" if key else ""
    pages = service_client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **options)
    with _os_errors(uri):
        for page in pages:
            for item in page.get("Contents", []):
                yield item["Key"].removeprefix(prefix), item


@contextlib.contextmanager
def _os_errors(uri: str) -> Iterator[None]:
    """Turns the errors of boto3 in the block into `OSError`, `FileNotFoundError` if there is no object at `uri`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] == "404":
            raise FileNotFoundError(f"{uri} does not exist") from error
        raise OSError(str(error)) from error


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def region() -> str | None:
    """The region of this process. Boto3 does not read `AWS_REGION`, which is what SageMaker sets in its jobs."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _environment() -> tuple[tuple[str, str], ...]:
    """Server, region and credentials, as far as the environment has them."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def service_client(
    service: str, region_name: str | None = None, connections: int = 32, attempts: int = _ATTEMPTS
) -> Any:
    """A boto3 client that makes `attempts` attempts where it is throttled. It may be used by several threads."""
    return _client(service, region_name or region(), connections, attempts, _environment())


@functools.lru_cache(maxsize=32)
def _client(
    service: str, region_name: str | None, connections: int, attempts: int, environment: tuple[tuple[str, str], ...]
) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=connections,
        tcp_keepalive=True,
    )
    # A session of its own: boto3's default session must not be used by several threads at once.
    session = boto3.Session(region_name=region_name)
    return session.client(service, config=config)  # pyright: ignore[reportCallIssue, reportArgumentType]
