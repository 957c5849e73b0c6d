"""The version of a step's code: a digest of all of the project's modules that can take part in running it.

Modules are followed from file to file: by import statements wherever they stand, by dotted names in strings (as
engines and child processes are named), and by literal arguments of `import_module`. Nothing is imported. Modules of the
project count wherever they lie; installed libraries count by their versions, which a request states beside the code.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path

from step_scripts.runner.loaded_code import PACKAGE, digest_of, own_places

# What runs every step, locally and in a job.
_RUNNERS = tuple(f"{PACKAGE}.{name}" for name in ("runner.execution", "runner.worker", "cluster.__main__"))
# Libraries that results depend on.
_COMPUTING = ("numpy", "optuna", "pandas", "polars", "pyarrow", "ray", "xgboost", "xgboost-ray")

_HEAD = re.compile(r"(?:^|[;:])[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+)?$", re.MULTILINE)  # of a line, before `import`
_NAMES = re.compile(r"[ \t]*(?:\(([^)]*)\)|((?:\\\n|[^\n;])*))")  # behind it
_CALL = re.compile(r"""(?:_module|__)\(\s*["']([\w.]+)["']""")  # the end of `import_module(…)` and `__import__(…)`
_DOTTED = re.compile(r"""["'](\w+(?:\.\w+)+)["']""")
_NAME = re.compile(r"[\w.]+")
_COMMENT = re.compile(r"#[^\n]*")


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


def sources_now(modules: Iterable[str]) -> dict[str, set[str]]:
    """Digests of modules, read from their files again; none for a file that is gone. Other names are left out."""
    found: dict[str, set[str]] = {}
    for module in modules:
        if (path := _file_of(module)) is not None:
            found[module] = {digest_of(path.read_bytes())} if path.exists() else set()
    return found


def version_of(sources: Mapping[str, str]) -> str:
    """12 hexadecimal digits that stand for modules and their digests."""
    return sha256("".join(f"{name}\0{sources[name]}\0" for name in sorted(sources)).encode()).hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Versions, as installed now, of the libraries that compute, and Python's.

    Python's minor version counts: `sum` of floating point numbers rounds differently since 3.12.
    """
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in _COMPUTING:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _sources(*roots: str) -> dict[str, str]:
    pending = [name if "." in name else f"{PACKAGE}.{name}" for name in roots]
    if absent := [name for name in pending if _file_of(name) is None]:
        raise FileNotFoundError(f"there is no module {absent[0]}")
    sources: dict[str, str] = {}
    while pending:
        module = pending.pop()
        if module not in sources and (path := _file_of(module)) is not None:
            sources[module], followed = _read(module, path)
            pending += followed
    return sources


@cache
def _file_of(module: str) -> Path | None:
    """The source file of one of the project's modules; None for what is none. `find_spec` would import its parents."""
    top, *rest = module.split(".")
    for place in own_places(top):
        if place.suffix == ".py":
            return None if rest else place
        folder = place.joinpath(*rest[:-1])
        if rest and f"{rest[-1]}.py" in _listing(folder):
            return folder / f"{rest[-1]}.py"
        if (not rest or rest[-1] in _listing(folder)) and "__init__.py" in _listing(place.joinpath(*rest)):
            return place.joinpath(*rest, "__init__.py")
    return None


@cache
def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(path.name for path in folder.iterdir())
    except OSError:
        return frozenset()


@cache
def _read(module: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """The digest of a module's source, and the modules that it, or loading it, can load. Steps share most of theirs."""
    source = path.read_bytes()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    mentioned = {module, *_mentioned(source.decode(), package)}
    return digest_of(source), tuple({parent for name in mentioned for parent in _with_parents(name)})


def _with_parents(module: str) -> Iterator[str]:
    """The module and the packages that it is in, which are loaded before it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _mentioned(source: str, package: str) -> Iterator[str]:
    position = source.find("import")
    while position >= 0:
        line = source.rfind("\n", 0, position) + 1
        behind = position + len("import")
        if call := _CALL.match(source, behind):
            yield call[1]
        elif (head := _HEAD.search(source, line, position)) and (names := _NAMES.match(source, behind)):
            yield from _imported(head[1], _COMMENT.sub("", names[1] or names[2]), package)
        position = source.find("import", behind)
    for match in _DOTTED.finditer(source):
        if _file_of(match[1]) is not None:  # "data.csv" is no module of a folder `data`
            yield match[1]


def _imported(origin: str | None, listed: str, package: str) -> Iterator[str]:
    """Modules of one statement. What is imported from a package may be a module of it."""
    names = [found[0] for part in listed.split(",") if (found := _NAME.search(part))]
    if origin is None:
        yield from names
        return
    if level := len(origin) - len(origin.lstrip(".")):
        parents = package.split(".")
        origin = ".".join([*parents[: len(parents) - level + 1], *filter(None, [origin[level:]])])
    yield origin
    yield from (f"{origin}.{name}" for name in names)
