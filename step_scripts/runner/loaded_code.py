"""Which sources this process has loaded: the digest of each of the project's modules, taken while it was loaded.

The package itself installs the recorder before it loads any other of its modules, in every process: a step's driver,
Ray's workers. Files may change during a run; what counts is what a process has read. Imports only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

JOURNAL = "HOUSING_LOADED_CODE"
"""Environment variable: the file to which processes add what they load, a line `<module> <digest>` each."""
PACKAGE = __name__.partition(".")[0]
_INSTALLED = ("site-packages", "dist-packages")
_loaded: dict[str, set[str]] = {}


def digest_of(source: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(source).hexdigest()[:16]


def loaded_here() -> dict[str, set[str]]:
    """Digests by module. More than one where a module was loaded again, or its file changed in that moment."""
    return {module: set(digests) for module, digests in _loaded.copy().items()}


def read_journal(path: Path | None, start: int = 0) -> Iterator[tuple[str, str]]:
    """(Module, digest) of what other processes have loaded, from the byte `start` on; nothing if there is no file."""
    if path is not None and path.exists():
        with path.open("rb") as file:
            file.seek(start)
            for line in file.read().decode().splitlines():
                module, _, digest = line.partition(" ")
                yield module, digest


@cache
def own_places(package: str) -> tuple[Path, ...]:
    """Folders of a top-level package of the project, or the file of a module; empty for a library.

    A library belongs to Python, or lies among the installed packages. This package always belongs to the project.
    """
    if package in sys.stdlib_module_names or package in sys.builtin_module_names:
        return ()
    spec = _found_by_others(package)
    if spec is None:
        return ()
    places = [*(spec.submodule_search_locations or ()), *([] if spec.submodule_search_locations else [spec.origin])]
    paths = tuple(Path(place) for place in places if place and place not in ("built-in", "frozen"))
    if package != PACKAGE and any(_is_installed(path) for path in paths):
        return ()
    return paths


def _found_by_others(package: str) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is not _recorder and hasattr(finder, "find_spec"):
            try:
                spec = finder.find_spec(package, None)
            except Exception:  # noqa: BLE001  # another package's finder: what it cannot find is not the project's
                continue
            if spec is not None:
                return spec
    return None


def _is_installed(path: Path) -> bool:
    return not set(_INSTALLED).isdisjoint(path.parts) or path.is_relative_to(sysconfig.get_path("stdlib"))


class _RecordingLoader(SourceFileLoader):
    def get_code(self, fullname: str):  # a code object, or None
        # Before and after: the file may change in that moment.
        before = digest_of(self.get_data(self.path))
        code = super().get_code(fullname)
        for digest in {before, digest_of(self.get_data(self.path))}:
            _record(fullname, digest)
        return code


def _record(module: str, digest: str) -> None:
    _loaded.setdefault(module, set()).add(digest)
    if journal := os.environ.get(JOURNAL):
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{module} {digest}\n".encode())
        finally:
            os.close(descriptor)


class _Recorder:
    """Finds the project's modules as Python's own finder does, with a loader that records them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if not own_places(name.partition(".")[0]):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _RecordingLoader(spec.loader.name, spec.loader.path)
        return spec


_recorder = _Recorder()


def install() -> None:
    """Record what is loaded from now on, and what was loaded before: this package, its room and this module; in Ray's
    workers also the modules of a step outside this package, which imports it.
    """
    if any(type(finder).__name__ == _Recorder.__name__ for finder in sys.meta_path):
        return
    place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
    sys.meta_path.insert(place, _recorder)  # behind the finders of others, such as pytest's
    before = [PACKAGE, __package__, __name__]
    if os.environ.get(JOURNAL):
        before += [name for name in list(sys.modules) if name != "__main__" and own_places(name.partition(".")[0])]
    for module in dict.fromkeys(before):
        if (file := getattr(sys.modules[module], "__file__", None)) and file.endswith(".py"):
            _record(module, digest_of(Path(file).read_bytes()))
