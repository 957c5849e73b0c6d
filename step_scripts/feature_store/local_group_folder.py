"""A feature group in a local folder. Writers hold a lock on the folder itself, so there is no lock file to be left
behind; the lock goes with the process that holds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from step_scripts.feature_store.group_folder import (
    LOCK_SECONDS,
    Commit,
    CommitTaken,
    GroupFolder,
    StoredFile,
    commit_name,
)
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.locking import try_lock
from step_scripts.runner.private_files import private_folder

_POLL_SECONDS = 0.05


class LocalGroupFolder(GroupFolder):
    """The folder of one group below a local one."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(str(storage.local_path(root).absolute()), name)
        self.path = Path(self.uri)
        self.data = self.path / "data"
        self._log = self.path / "_commits"
        self._staging = self.path / "_staging"

    @property
    def data_uri(self) -> str:
        """The `data` folder."""
        return str(self.data)

    def append(self, commit: Commit) -> None:
        """Make `commit` visible, atomically, and never in place of another. The caller holds the lock."""
        storage.sync(self.uri, [f"data/{file.path}" for file in commit.files])
        private_folder(self._log)
        target = self._log / commit_name(commit.number)
        temporary = self._log / f".{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(commit.model_dump_json(indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, target)  # fails if the target exists, as a rename would not
            storage.sync(str(self._log), [])
        except FileExistsError as error:
            raise CommitTaken(f"another writer has made commit {commit.number} of {self.name}; ingest again") from error
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> Iterator[None]:
        """Be the group's only writer. Raises `StepError` if others hold the lock for longer than `seconds`.

        Without `create`, also if there is no such group.
        """
        deadline = time.monotonic() + seconds
        descriptor = self._locked_descriptor(deadline, create)
        try:
            yield
        finally:
            os.close(descriptor)

    def _locked_descriptor(self, deadline: float, create: bool) -> int:
        while True:
            if create:
                private_folder(self.path.parent)
                with contextlib.suppress(FileExistsError):  # `exist_ok` still raises if a deletion comes in between
                    self.path.mkdir()
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if create:  # deleted since it was made
                    continue
                raise StepError(f"there is no feature group {self.name} in {self.path.parent}") from None
            locked = False
            try:
                while not (locked := try_lock(descriptor, self.path) and self._is_at_path(descriptor)):
                    if not self._is_at_path(descriptor):
                        break
                    if time.monotonic() > deadline:
                        raise StepError(
                            f"feature group {self.name} is being written to by another run; wait for it, or end it"
                        )
                    time.sleep(_POLL_SECONDS)
            finally:
                if not locked:
                    os.close(descriptor)
            if locked:
                return descriptor

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the open folder is still the one at the group's path: a deletion may have come first."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A scratch folder for the length of the block. The caller holds the lock."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield str(folder)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def remove_strays(self) -> int:
        """Remove what killed writers left: data files that no commit names, scratch. The caller holds the lock."""
        shutil.rmtree(self._staging, ignore_errors=True)
        for temporary in (*self._log.glob(".*.tmp"), *self.path.glob(".*.tmp")):
            temporary.unlink(missing_ok=True)
        committed = {f.path for c in self.commits() for f in c.files}
        strays = 0
        for folder, _, names in os.walk(self.data, topdown=False):
            for name in names:
                path = Path(folder) / name
                if path.relative_to(self.data).as_posix() not in committed:
                    path.unlink()
                    strays += 1
            with contextlib.suppress(OSError):  # not empty
                Path(folder).rmdir()
        return strays

    def remove(self) -> None:
        """Delete the group. The caller holds the lock; it is gone at once, however long the removal takes."""
        storage.discard_folder(self.path)

    def remove_attempt(self, token: str) -> None:
        """Remove what the caller, who holds the lock, has written: nobody else's files are uncommitted."""
        self.remove_strays()

    def _commit_names(self) -> list[str]:
        return sorted(p.name for p in self._log.glob("[0-9]*.json")) if self._log.is_dir() else []

    def _commit_texts(self, names: Sequence[str]) -> list[bytes]:
        return [(self._log / name).read_bytes() for name in names]

    def _sizes(self, files: Sequence[StoredFile]) -> dict[str, int]:
        sizes = {}
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                sizes[file.path] = (self.data / file.path).stat().st_size
        return sizes
