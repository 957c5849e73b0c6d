"""Whether a step runs with the code and the libraries that were asked for. The process that runs it says so itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from step_scripts.runner.code_version import library_versions, sources_now
from step_scripts.runner.contract import StepError, StepRequest
from step_scripts.runner.loaded_code import loaded_here, read_journal
from step_scripts.runner.ray_session import RaySession


def require_unchanged(request: StepRequest) -> None:
    """Raise `StepError` if a file of the request's code has changed since it was read, before anything is started."""
    _require_same(request, sources_now(request.sources))


def _require_same(request: StepRequest, found: Mapping[str, Collection[str]]) -> None:
    asked = request.sources
    if changed := sorted(name for name, digests in found.items() if name in asked and set(digests) != {asked[name]}):
        raise StepError(
            f"the code of step {request.step} has changed since Dagster loaded it: {', '.join(changed)} would be, or "
            f"were, other sources than those asked for (code version {request.code_version}). Nothing was stored. Run "
            "it again; where Dagster has been running since before the change, reload the code location first"
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
    """Follows what is loaded in this process, and in the workers of `session`, while a request is served.

    Workers of a private session say what they load; nodes of a given cluster are asked once what lies there: their code
    is a copy that was made for this session, or for the job.
    """

    def __init__(self, request: StepRequest, session: RaySession | None = None) -> None:
        self._request = request
        self._session = session
        self._known = set(loaded_here())
        self._start = journal.stat().st_size if (journal := self._journal) is not None and journal.exists() else 0

    @property
    def _journal(self) -> Path | None:
        return self._session.journal if self._session is not None else None

    def require(self) -> None:
        """Raise `StepError` if a module was loaded that is not the one asked for, or a library has another version.

        Modules count from the start of the processes on: they serve one request after the other.
        """
        loaded = loaded_here()
        for module, digest in read_journal(self._journal):
            loaded.setdefault(module, set()).add(digest)
        _require_same(self._request, loaded)
        _require_libraries(self._request, library_versions(), "")
        for node, report in (self._session.node_reports() if self._session is not None else {}).items():
            _require_same(self._request, {module: {digest} for module, digest in report.sources.items()})
            _require_libraries(self._request, report.libraries, f" on Ray node {node}")

    def unversioned(self) -> list[str]:
        """Modules of the project that have been loaded since, and that the request's code version does not cover."""
        if not self._request.sources:
            return []
        since = set(loaded_here()) - self._known
        since.update(module for module, _ in read_journal(self._journal, self._start))
        return sorted(since - self._request.sources.keys())
