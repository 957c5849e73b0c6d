"""Files behind URIs. `tests/sagemaker/test_storage_on_s3.py` runs the tests that take `root` on S3 too."""

from __future__ import annotations

from pathlib import Path

import pytest

from step_scripts.runner import storage


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def names(root: str) -> list[str]:
    return [uri.removeprefix(root + "/") for uri in storage.list_files(root)]


def test_write_replaces_and_leaves_nothing_else(root: str) -> None:
    uri = storage.join(root, "a", "b.json")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert names(root) == ["a/b.json"]


def test_archives_are_written_as_they_are(root: str) -> None:
    for name in ("a.json.gz", "b.tar.gz"):
        storage.write_bytes(storage.join(root, name), b"content")
        assert storage.read_bytes(storage.join(root, name)) == b"content"
    with storage.open_output(storage.join(root, "c.gz")) as file:
        file.write(b"content")
    assert storage.read_bytes(storage.join(root, "c.gz")) == b"content"


def test_a_failed_write_keeps_the_old_content(root: str) -> None:
    uri = storage.join(root, "b.json")
    storage.write_bytes(uri, b"one")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "text")  # pyright: ignore[reportArgumentType]
    assert storage.read_bytes(uri) == b"one"
    assert names(root) == ["b.json"]


def test_listing_deleting_and_existence(root: str) -> None:
    for name in ("x/2.txt", "x/1.txt", "y.txt"):
        with storage.open_output(storage.join(root, name)) as stream:
            stream.write(name.encode())
    assert names(root) == ["x/1.txt", "x/2.txt", "y.txt"]
    assert storage.exists(storage.join(root, "x"))
    assert storage.exists(storage.join(root, "x/1.txt"))
    storage.delete_folder(storage.join(root, "x"))
    storage.delete_file(storage.join(root, "y.txt"))
    storage.delete_file(storage.join(root, "never"))
    storage.delete_folder(storage.join(root, "never"))
    assert names(root) == []
    assert not storage.exists(storage.join(root, "x/1.txt"))
    assert storage.list_files(storage.join(root, "never")) == []


def test_reading_parts_of_a_file(root: str) -> None:
    uri = storage.join(root, "digits")
    storage.write_bytes(uri, b"0123456789" * 100_000)
    with storage.open_input(uri) as file:
        file.seek(999_995)
        assert file.read() == b"56789"
        file.seek(3)
        assert file.read(4) == b"3456"


def test_missing_files(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "never"))
    with pytest.raises(FileNotFoundError), storage.open_input(storage.join(root, "never")):
        pass
    assert not storage.exists(storage.join(root, "never"))


def test_foreign_schemes() -> None:
    with pytest.raises(ValueError, match="only local paths and s3"):
        storage.filesystem("gs://bucket/x")
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("file:///x")
    assert storage.local_path("file:///x") == Path("/x")
