"""Files behind URIs, on the local file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from step_scripts import storage


def test_write_replaces_atomically_and_leaves_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path / "a" / "b.json")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    uri = str(tmp_path / "b.json")
    storage.write_bytes(uri, b"one")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "text")  # pyright: ignore[reportArgumentType]
    assert storage.read_bytes(uri) == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_listing_deleting_and_existence(tmp_path: Path) -> None:
    root = str(tmp_path)
    for name in ("x/2.txt", "x/1.txt", "y.txt"):
        with storage.open_output(storage.join(root, name)) as stream:
            stream.write(name.encode())
    assert [Path(u).relative_to(root).as_posix() for u in storage.list_files(root)] == ["x/1.txt", "x/2.txt", "y.txt"]
    assert storage.exists(storage.join(root, "x"))
    storage.delete(storage.join(root, "x"))
    storage.delete(storage.join(root, "y.txt"))
    storage.delete(storage.join(root, "never"))
    assert storage.list_files(root) == []
    assert not storage.exists(storage.join(root, "x"))
    assert storage.list_files(storage.join(root, "never")) == []


def test_missing_files_and_foreign_schemes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "never"))
    with pytest.raises(ValueError, match="only local paths and s3"):
        storage.filesystem("gs://bucket/x")
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("file:///x")
    assert storage.local_path("file:///x") == Path("/x")
