"""The sources and libraries behind a step: the version of its code, and what this process has loaded of it.

The version is a digest of all of the project's modules that can take part in running the step. Modules are followed
from file to file: by import statements wherever they stand, by dotted names in strings (as engines and child processes
are named), and by literal arguments of `import_module`. Nothing is imported. Modules of the project count wherever they
lie; installed libraries count by their versions, which a request states beside the code.

Files may change during a run; what counts is what a process has read. So the package installs the recorder here before
it loads any other of its modules, in every process: a step's driver, Ray's workers. Imports only the standard library.
`step_scripts.runner.execution` compares a request with what was loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

JOURNAL = "HOUSING_LOADED_CODE"
"""Environment variable: the file to which processes add what they load, a line `<module> <digest>` each."""
PACKAGE = __name__.partition(".")[0]
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_loaded: dict[str, set[str]] = {}
# What runs every step, locally and in a job.
_RUNNERS = tuple(f"{PACKAGE}.{name}" for name in ("runner.execution", "runner.worker", "cluster.__main__"))
# Libraries that results depend on.
_COMPUTING = ("numpy", "optuna", "pandas", "polars", "pyarrow", "ray", "xgboost", "xgboost-ray")

# A statement at the start of a line or behind `;` or `:`: where from, and the names, in parentheses or without.
_IMPORT = re.compile(
    r"(?:^|[;:])[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+)?import\b[ \t]*(?:\(([^)]*)\)|((?:\\\n|[^\n;])*))", re.MULTILINE
)
# The argument of `import_module(…)` or `__import__(…)`; a dotted name.
_QUOTED = re.compile(r"""(?:(?:_module|__)\(\s*["']([\w.]+)|["'](\w+(?:\.\w+)+))["']""")
_NAME = re.compile(r"(?<!as )\b[\w.]+")  # but aliases


class NodeReport(NamedTuple):
    """What a node of a cluster has: digests of this package's sources by module, versions of libraries."""

    sources: dict[str, str]
    libraries: dict[str, str]


def step_version(step: str) -> str:
    """The version of what runs step `step`, see `step_sources`."""
    return version_of(step_sources(step))


@cache
def step_sources(step: str) -> Mapping[str, str]:
    """Digests of the sources that running `step` can load, by module. A dotted name is a step outside this package.

    Each file is read once, so that all versions in this process are of one moment. Raises `FileNotFoundError` if there
    is no module of that name.
    """
    return _sources(step, *_RUNNERS)


def module_version(module: str) -> str:
    """The version of a module that is no step, and of what it imports."""
    return version_of(_sources(module))


def version_of(sources: Mapping[str, str]) -> str:
    """12 hexadecimal digits that stand for modules and their digests."""
    return hashlib.sha256("".join(f"{name}\0{sources[name]}\0" for name in sorted(sources)).encode()).hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Versions, as installed now, of the libraries that compute, and Python's.

    Python's minor version counts: `sum` of floating point numbers rounds differently since 3.12.
    """
    import importlib.metadata  # slow

    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in _COMPUTING:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report_of_node() -> NodeReport:
    """The report of the machine that calls this. Other packages of the project are not part of it."""
    folder = Path(__file__).parents[1]
    sources = {}
    for path in folder.rglob("*.py"):
        module = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        sources[module.removesuffix(".__init__")] = digest_of(path.read_bytes())
    return NodeReport(sources, library_versions())


def _sources(*roots: str) -> dict[str, str]:
    pending = [name if "." in name else f"{PACKAGE}.{name}" for name in roots]
    if absent := [name for name in pending if file_of(name) is None]:
        raise FileNotFoundError(f"there is no module {absent[0]}")
    sources: dict[str, str] = {}
    seen = {""}
    while pending:
        if (module := pending.pop()) in seen:
            continue
        seen.add(module)
        pending.append(module.rpartition(".")[0])  # the package that it is in is loaded before it
        if (path := file_of(module)) is not None:
            sources[module], mentioned = _read(module, path)
            pending += mentioned
    return sources


@cache
def file_of(module: str) -> Path | None:
    """The source file of one of the project's modules; None for what is none. `find_spec` would import its parents."""
    top, *rest = module.split(".")
    for place in own_places(top):
        path = place.joinpath(*rest)
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py") if rest else path):
            if file.is_file():
                return file
    return None


@cache
def _read(module: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """The digest of a module's source, and the names of modules in it. Steps share most of theirs."""
    source = path.read_bytes()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return digest_of(source), tuple(_mentioned(source.decode(), package))


def _mentioned(source: str, package: str) -> Iterator[str]:
    for origin, *listed in _IMPORT.findall(source):
        names = _NAME.findall("".join(listed))  # words of comments do no harm
        if not origin:
            yield from names
            continue
        origin = importlib.util.resolve_name(origin, package)
        yield origin
        yield from (f"{origin}.{name}" for name in names)  # what is imported from a package may be a module of it
    for called, dotted in _QUOTED.findall(source):
        if called or file_of(dotted) is not None:  # "data.csv" is no module of a folder `data`
            yield called or dotted


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
