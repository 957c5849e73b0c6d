"""Locks, and what is said where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from step_scripts.runner.local_files import NoLocks, file_lock
from step_scripts.runner.ray_environment import make_folder, remove_abandoned


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system without a lock service."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("refused")
def test_a_file_system_without_locks_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        pytest.raises(NoLocks, match=f"refuses locks.*local_lock=flock.*HOUSING_ROOT.*{path}"),
        file_lock(path, 1, "x"),
    ):
        pass


@pytest.mark.usefixtures("refused")
def test_a_temporary_folder_without_locks_is_used_and_never_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = make_folder("housing-")
    folder.release()
    assert folder.path not in remove_abandoned()
    assert folder.path.exists()


def test_only_abandoned_folders_with_our_marker_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    abandoned, used = make_folder("housing-"), make_folder("ray-")
    assert abandoned.path.stat().st_mode & 0o777 == 0o700
    (abandoned.path / "session" / "logs").mkdir(parents=True)
    foreign = tmp_path / "housing-of-somebody"
    foreign.mkdir()
    (foreign / "file").touch()
    link = tmp_path / "housing-link"
    link.symlink_to(used.path)
    abandoned.release()
    assert [path for path in remove_abandoned() if path.parent == tmp_path] == [abandoned.path]
    assert sorted(tmp_path.iterdir()) == sorted([used.path, foreign, link])
    used.remove()
    assert not used.path.exists()
