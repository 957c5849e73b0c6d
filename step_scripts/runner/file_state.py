"""What tells, without reading a file, that its content has changed.

Size and time of modification do not: `cp -p`, `rsync --times` and `touch -r` keep both. The time of change and the
inode of a local file cannot be kept by whoever writes it, and the ETag of an object on S3 depends on its content.
S3's version id would tell nothing more (versions with the same ETag have the same content), and a listing does not
have it: it would cost another call and another permission.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from step_scripts.runner import storage

_INODE = " inode "


@dataclass(frozen=True)
class FileState:
    """`modified`: seconds since 1970. `change` differs whenever the file was written, or replaced by another."""

    bytes: int
    modified: float
    change: str


def local_state(found: os.stat_result) -> FileState:
    """The state of a local file: `change` is the time of change in ns and the inode."""
    return FileState(found.st_size, found.st_mtime_ns / 1e9, f"{found.st_ctime_ns}{_INODE}{found.st_ino}")


def lasting(change: str) -> str:
    """`change` without the inode, which some file systems (sshfs, s3fs) make up anew at every look.

    For looks at a file that is still the same one. Otherwise such a file is read once more than needed.
    """
    return change.partition(_INODE)[0]


def file_state(uri: str) -> FileState:
    """The state of the file at `uri` now. Raises `FileNotFoundError`, or `OSError` if it cannot be asked for."""
    if not storage.is_remote(uri):
        return local_state(storage.local_path(uri).stat())
    from botocore.exceptions import BotoCoreError, ClientError

    from step_scripts.runner.s3_objects import service_client, split_uri

    bucket, key = split_uri(uri)
    try:
        found = service_client("s3").head_object(Bucket=bucket, Key=key)
    except (ClientError, BotoCoreError) as error:
        response = getattr(error, "response", {})
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            raise FileNotFoundError(f"{uri} does not exist") from error
        raise OSError(str(error)) from error
    return FileState(found["ContentLength"], found["LastModified"].timestamp(), found["ETag"].strip('"'))
