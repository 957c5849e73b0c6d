"""Which sources this process has loaded: the digest of each of the project's modules, taken while it was loaded.

The package itself installs the recorder before it loads any other of its modules, in every process: a step's driver,
Ray's workers. Files may change during a run; what counts is what a process has read. Imports only the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
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
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
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
        for line in path.read_bytes()[start:].decode().splitlines():
            module, _, digest = line.partition(" ")
            yield module, digest


@cache
def own_places(package: str) -> tuple[Path, ...]:
    """Folders of a top-level package of the project, or the file of a module; empty for a library."""
    try:
        spec = None if package in sys.stdlib_module_names else importlib.util.find_spec(package)
    except (ImportError, ValueError):  # `__main__` has no spec
        spec = None
    if spec is None:
        return ()
    places = list(spec.submodule_search_locations or [spec.origin])
    return tuple(Path(place) for place in places if place) if all(_is_own(package, p) for p in places) else ()


def _is_own(module: str, place: str | None) -> bool:
    """Whether a module is the project's: not Python's, and not below the installed packages, unless it is this one."""
    if module.partition(".")[0] == PACKAGE:
        return True
    return (
        place is not None
        and not place.startswith(_STANDARD_LIBRARY)
        and not any(folder in place for folder in _INSTALLED)
    )


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
        with Path(journal).open("a") as file:
            file.write(f"{module} {digest}\n")


class _Recorder:
    """Finds modules as Python's own finder does, those of the project with a loader that records them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader and _is_own(name, spec.origin):
            spec.loader = _RecordingLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Record what is loaded from now on, and what was loaded before: this package, its room and this module; in Ray's
    workers also the modules of a step outside this package, which imports it.
    """
    if any(type(finder).__name__ == _Recorder.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(sys.meta_path.index(PathFinder), _Recorder())  # behind the finders of others, such as pytest's
    before = [PACKAGE, __package__, __name__]
    if os.environ.get(JOURNAL):
        before += [name for name in list(sys.modules) if name != "__main__" and own_places(name.partition(".")[0])]
    for module in dict.fromkeys(before):
        if (file := getattr(sys.modules[module], "__file__", None)) and file.endswith(".py"):
            _record(module, digest_of(Path(file).read_bytes()))
