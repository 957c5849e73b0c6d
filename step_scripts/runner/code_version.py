"""The version of a step's code, and whether a step runs with the code and the libraries that were asked for.

The version is a digest of all of the project's modules that can take part in running the step. Modules are followed
from file to file: by import statements wherever they stand, by dotted names in strings (as engines and child processes
are named), and by literal arguments of `import_module`. Nothing is imported. Modules of the project count wherever they
lie; installed libraries count by their versions, which a request states beside the code.

The process that runs the step compares the request with what it has loaded (`step_scripts.runner.loaded_code`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from step_scripts.runner.contract import StepError, StepRequest
from step_scripts.runner.loaded_code import PACKAGE, digest_of, loaded_here, own_places, read_journal

if TYPE_CHECKING:
    from step_scripts.runner.ray_session import RaySession

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


def require_unchanged(request: StepRequest) -> None:
    """Raise `StepError` if a file of the request's code has changed since. For before the step starts."""
    files = {module: path for module in request.sources if (path := file_of(module)) is not None}
    _require_same(request, {m: {digest_of(path.read_bytes())} if path.exists() else {} for m, path in files.items()})


def _require_same(request: StepRequest, found: Mapping[str, Collection[str]]) -> None:
    asked = request.sources
    if changed := sorted(name for name, digests in found.items() if name in asked and set(digests) != {asked[name]}):
        raise StepError(
            f"the code of step {request.step} has changed since Dagster loaded it: {', '.join(changed)} would be, or "
            f"were, other sources than those asked for (code version {request.code_version}). Nothing was stored. Run "
            "it again; if Dagster was started before the change, reload the code location first"
        )


def _require_libraries(request: StepRequest, here: Mapping[str, str], where: str) -> None:
    differing = [
        f"{name} {here.get(name, 'is missing')}, asked for was {version}"
        for name, version in sorted(request.environment.items())
        if name != "image" and here.get(name) != version
    ]
    if differing:
        raise StepError(
            f"step {request.step} runs with other libraries than those asked for{where}: {'; '.join(differing)}. "
            "Nothing was stored. Install the same versions there and where Dagster runs; restart Dagster if they have "
            "changed"
        )


class CodeCheck:
    """Compares a request with what this process and the workers of `session` load while it is served.

    Workers of a private session record what they load. Nodes of a given cluster are asked once what they have: their
    code is a copy that was made for this session, or for the job.
    """

    def __init__(self, request: StepRequest, session: RaySession) -> None:
        self._request, self._session = request, session
        self._known = set(loaded_here())
        self._start = journal.stat().st_size if (journal := session.journal) is not None and journal.exists() else 0

    def require(self) -> None:
        """Raise `StepError` if a module was loaded that is not the one asked for, or a library has another version.

        Modules count from the start of the processes on: they serve one request after the other.
        """
        loaded = loaded_here()
        for module, digest in read_journal(self._session.journal):
            loaded.setdefault(module, set()).add(digest)
        _require_same(self._request, loaded)
        _require_libraries(self._request, library_versions(), "")
        for node, report in self._session.node_reports().items():
            _require_same(self._request, {module: {digest} for module, digest in report.sources.items()})
            _require_libraries(self._request, report.libraries, f" on Ray node {node}")

    def unversioned(self) -> list[str]:
        """Modules of the project that have been loaded since, and that the request's code version does not cover."""
        if not self._request.sources:
            return []
        since = set(loaded_here()) - self._known
        since.update(module for module, _ in read_journal(self._session.journal, self._start))
        return sorted(since - self._request.sources.keys())
