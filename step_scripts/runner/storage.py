"""Files behind URIs: a local path, or `s3://bucket/prefix`. The same calls serve both, through Arrow's file systems.

Small objects are written atomically: a reader sees the old bytes or the new ones, never a part of them. Whether a file
has changed is seen without reading it, by `FileState`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from step_scripts.runner import s3_objects
from step_scripts.runner.local_files import file_named, private_folder, replacing, sync_path

if TYPE_CHECKING:
    from pyarrow import fs


_INODE = " inode "
# What Arrow takes credentials from, other than files and services that renew them.
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


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
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _s3(endpoint, s3_objects.region(), tuple(os.environ.get(name) for name in _CREDENTIALS)), path


@functools.lru_cache(maxsize=8)
def _s3(endpoint: str | None, region: str | None, credentials: tuple[str | None, ...]) -> fs.FileSystem:
    """One file system for each place and account, so that connections are kept."""
    from pyarrow import fs

    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
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
    if is_remote(uri):
        content = memoryview(data)  # fails before anything is written: Arrow would store a part
        with open_output(uri) as stream:
            stream.write(content)
        return
    with replacing(local_path(uri)) as file:
        file.write(data)


def write_json(uri: str, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, default=str).encode())


def upload(file: Path, uri: str) -> None:
    """Copy a local file to `uri` on S3, in pieces. If that fails, nothing is changed at `uri`."""
    if not is_remote(uri):
        raise ValueError(f"{uri} is a local path: write the file there")
    bucket, key = s3_objects.split_uri(uri)
    s3_objects.service_client("s3").upload_file(str(file), bucket, key)


def open_input(uri: str) -> AbstractContextManager[IO[bytes]]:
    """A seekable binary file open for reading. Raises `FileNotFoundError`."""
    filesystem_, path = filesystem(uri)
    # Arrow's NativeFile implements the file protocol.
    return filesystem_.open_input_file(path)  # pyright: ignore[reportReturnType]


def open_plain(uri: str) -> AbstractContextManager[IO[bytes]]:
    """As `open_input`, but local files without Arrow, which takes a while to import."""
    return open_input(uri) if is_remote(uri) else local_path(uri).open("rb")


@contextmanager
def open_output(uri: str) -> Iterator[IO[bytes]]:
    """A binary stream open for writing; parent folders are made. Not atomic: commit by a manifest."""
    filesystem_, path = filesystem(uri)
    if not is_remote(uri):
        private_folder(Path(path).parent)
    naming = contextlib.nullcontext() if is_remote(uri) else file_named(Path(path))
    # Without `compression` Arrow compresses what goes into a file whose name ends with .gz.
    with naming, filesystem_.open_output_stream(path, compression=None) as stream:
        yield stream  # pyright: ignore[reportReturnType]  # Arrow's NativeFile implements the file protocol


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
        try:
            found[path] = local_path(join(uri, path)).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def sync(uri: str, paths: Iterable[str]) -> None:
    """Sync the local files at `paths` below `uri` and their folders to disk, so that they survive a power cut.

    Does nothing on S3. Call it before the file that commits them is written.
    """
    if is_remote(uri):
        return
    root = local_path(uri).absolute()
    files = [root / path for path in paths]
    folders = {root, root.parent}
    for file in files:
        sync_path(file)
        folders.update(folder for folder in file.parents if folder.is_relative_to(root))
    for folder in folders:
        sync_path(folder)


def delete(uri: str) -> None:
    """Remove the file, or everything below the prefix, on S3 with folder markers. Does nothing if there is nothing.

    Raises `OSError`; `ValueError` for a whole bucket.
    """
    if is_remote(uri):
        with s3_objects.os_errors(uri):
            try:
                file_state(uri)
            except FileNotFoundError:
                s3_objects.delete_prefix(uri)
            else:
                folder, _, name = uri.rpartition("/")
                s3_objects.delete_objects(folder, [name])
        return
    path = local_path(uri)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class FileState:
    """The state of a file. `modified`: seconds since 1970. `change` differs whenever the file is written or replaced.

    Size and time of modification do not tell: `cp -p`, `rsync --times` and `touch -r` keep both. The writer of a file
    cannot keep the time of change and the inode of a local file, or the ETag of an object on S3. S3's version id would
    add nothing: versions with the same ETag have the same content, and a listing does not include it.
    """

    bytes: int
    modified: float
    change: str


def file_state(uri: str) -> FileState:
    """The state of the file at `uri` now. Raises `FileNotFoundError`, or `OSError` if it cannot be asked for."""
    if not is_remote(uri):
        return local_state(local_path(uri).stat())
    bucket, key = s3_objects.split_uri(uri)
    with s3_objects.os_errors(uri):
        found = s3_objects.service_client("s3").head_object(Bucket=bucket, Key=key)
    return _object_state(found["ContentLength"], found)


def object_states(uri: str, *, deep: bool = True) -> Iterator[tuple[str, FileState]]:
    """Path below a prefix on S3 and state of each object there, without folder markers. Raises `OSError`.

    Unless `deep`, without the objects in folders below the prefix.
    """
    with s3_objects.os_errors(uri):
        for prefix, page in s3_objects.listed(uri, **({} if deep else {"Delimiter": "/"})):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield item["Key"].removeprefix(prefix), _object_state(item["Size"], item)


def _object_state(size: int, found: Mapping[str, Any]) -> FileState:
    return FileState(size, found["LastModified"].timestamp(), found["ETag"].strip('"'))


def local_state(found: os.stat_result) -> FileState:
    """The state of a local file: `change` is the time of change in ns and the inode."""
    return FileState(found.st_size, found.st_mtime_ns / 1e9, f"{found.st_ctime_ns}{_INODE}{found.st_ino}")


def lasting(change: str) -> str:
    """`change` without the inode, which some file systems (sshfs, s3fs) make up anew for each call.

    For comparisons of a file that has not been replaced. There the inode would only cause a needless read.
    """
    return change.partition(_INODE)[0]
