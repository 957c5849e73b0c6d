"""Runs one step: reuses a valid manifest, or executes the step and commits its outputs.

The process that runs the step compares the request with the code that it has loaded (`CodeCheck`).
"""

from __future__ import annotations

import importlib
import json
import logging
import resource
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from step_scripts.runner import storage
from step_scripts.runner.code_version import digest_of, file_of, library_versions, loaded_here, read_journal
from step_scripts.runner.contract import (
    DamagedArtifactError,
    Reporter,
    StepContext,
    StepDefinition,
    StepError,
    StepOutcome,
    StepParams,
    StepRequest,
    StepResult,
    check_files,
    noted_operators,
)
from step_scripts.runner.local_files import explain_full_disk, sync_files
from step_scripts.runner.ray_session import RaySession


def load_step(name: str) -> StepDefinition:
    """The definition in `step_scripts.<name>`, or, for a dotted name, in that module.

    Raises `StepError` for a name that is no step.
    """
    module = name if "." in name else f"step_scripts.{name}"
    try:
        return importlib.import_module(module).STEP
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise
        raise StepError(f"there is no step {module}") from error


def find_result(request: StepRequest, unusable: Callable[[str], None] | None = None) -> StepResult | None:
    """The result of an earlier run of the same request, if it is complete and not older than `request.not_before`.

    `unusable` is called with the reason if there is such a result and it has to be made again: a file of it is missing
    or not as it was written (see `contract.check_files`), or its code version does not cover all that took part.
    """
    try:
        manifest = StepResult.model_validate_json(storage.read_bytes(request.manifest_uri))
    except (FileNotFoundError, ValidationError):  # none, or one that another version of this module has written
        return None
    expired = request.not_before is not None and manifest.created_at < request.not_before
    if expired or manifest.request_digest != request.digest:
        return None
    try:
        if manifest.unversioned:
            raise DamagedArtifactError(f"its code version does not cover {', '.join(manifest.unversioned)}")
        for output in manifest.outputs.values():
            check_files(output, "local")
    except DamagedArtifactError as error:
        if unusable is not None:
            unusable(f"the earlier result of {request.step} is not reused but made again: {error}")
        return None
    return manifest.model_copy(update={"reused": True})


def run_step(
    request: StepRequest, reporter: Reporter, session: RaySession, *, attempt: str | None = None, waited: float = 0.0
) -> StepResult:
    """Run `request`, or answer it from its manifest.

    Raises `StepError` for bad input or parameters. On any failure the attempt's files are removed, other than those
    that the error says to keep, which then stand below `<output_uri>/failed/`. `attempt` names the folder of the files,
    for a caller that cleans up after a killed process. `waited`: how long the request has waited for Ray, seconds.
    """
    context = StepContext(request, storage.join(request.output_uri, attempt or uuid.uuid4().hex[:12]), reporter)
    if (found := find_result(request, reporter.warning)) is not None:
        _forget_checkpoints(context)
        return found
    code = CodeCheck(request, session)
    start = time.perf_counter() - waited
    step = load_step(request.step)
    params = _checked_params(request, step)
    code.require()
    context.confirm = code.require
    try:
        if step.uses_ray:
            with context.phase("start Ray"):
                session.ensure()
            if session.settings.address:
                code.require()  # of its nodes
            context.seconds["start Ray"] += waited
        noted_operators.set(operators := [])
        outcome = step.run(context, params)
        code.require()
        if absent := [name for name in step.outputs if name not in outcome.outputs]:
            raise RuntimeError(f"step {request.step} returned without its outputs {absent}")
        context.seconds["total"] = time.perf_counter() - start
        result = _commit(context, outcome, session, code.unversioned(), operators)
    except BaseException as error:
        local = [] if storage.is_remote(request.output_root) else [storage.local_path(request.output_root)]
        full = explain_full_disk(error, [*local, tempfile.gettempdir()])
        if isinstance(error, StepError):
            _keep(request, error)
        storage.delete_folder(context.attempt_uri)
        if full is not None:
            raise StepError(full) from error
        raise
    _forget_checkpoints(context)
    return result


def failure_of(error: BaseException) -> dict[str, Any]:
    """An exception as plain data: `kind`, `message`, and `details` or `traceback`.

    `kind` is `input` for a `StepError`, `crash` for any other.
    """
    if isinstance(error, StepError):
        return {"kind": "input", "message": str(error), "details": error.details}
    message = f"{type(error).__name__}: {error}"
    return {"kind": "crash", "message": message, "traceback": "".join(traceback.format_exception(error))}


def _forget_checkpoints(context: StepContext) -> None:
    """Remove what was kept for later attempts. An attempt that runs at the same time keeps its own."""
    for uri in (context.request.shared_checkpoint_uri, context.attempt_checkpoint_uri):
        if uri is not None:
            try:
                storage.delete_folder(uri)
            except OSError as error:
                context.log.warning(f"checkpoints remain at {uri}: {error}")


def _checked_params(request: StepRequest, step: StepDefinition) -> StepParams:
    """The parameters, if they and the inputs are as the step wants them."""
    if missing := [name for name in step.inputs if name not in request.inputs]:
        raise StepError(f"step {request.step} needs the inputs {missing}")
    try:
        params = step.params.model_validate(request.params)
    except ValidationError as error:
        reasons = (
            f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise StepError(f"parameters of step {request.step}: {'; '.join(reasons)}") from error
    for name, artifact in request.inputs.items():
        try:
            check_files(artifact)
        except DamagedArtifactError as error:
            raise StepError(
                f"input {name} of step {request.step} is damaged: {error}. Materialize the asset that made it again: "
                "damaged files are replaced"
            ) from error
    return params


def _commit(
    context: StepContext,
    outcome: StepOutcome,
    session: RaySession,
    unversioned: list[str],
    operators: list[dict[str, Any]],
) -> StepResult:
    request = context.request
    if unversioned:
        context.log.warning(
            f"step {request.step} has loaded {', '.join(unversioned)}, which its code version does not cover: the "
            "result will not be reused. Import the module, or name it in a string, where it is used"
        )
    written = context.attempt_uri.rstrip("/") + "/"
    for output in outcome.outputs.values():
        # What lies elsewhere was committed by whoever keeps it.
        if output.uri.startswith(written) and not storage.is_remote(written):
            folder = output.uri.removeprefix(request.output_root.rstrip("/") + "/")
            root = storage.local_path(request.output_root)
            sync_files(root, [f"{folder.rstrip('/')}/{file.path}" for file in output.files])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = StepResult(
        step=request.step,
        request_digest=request.digest,
        code_version=request.code_version,
        run_id=request.run_id,
        created_at=datetime.now(UTC),
        params=request.params,
        inputs=request.inputs,
        outputs=outcome.outputs,
        metrics=outcome.metrics,
        details=outcome.details,
        seconds={name: round(seconds, 4) for name, seconds in context.seconds.items()},
        peak_memory_bytes=peak * (1 if sys.platform == "darwin" else 1024),
        cpus=session.cpus(),
        nodes=session.nodes(),
        versions={**library_versions(), "python": sys.version.split()[0]},
        unversioned=unversioned,
        operators=operators,
    )
    # Keeps the order of the fields, which is the order in the UI.
    storage.write_bytes(request.manifest_uri, json.dumps(result.model_dump(mode="json"), indent=2).encode())
    return result


def _keep(request: StepRequest, error: StepError) -> None:
    for name, uri in error.keep.items():
        kept = request.kept_uri(name)
        with storage.open_input(uri) as source, storage.open_output(kept) as target:
            shutil.copyfileobj(source, target)
        error.details[name] = kept


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


class PrintReporter(logging.Logger):
    """Prints messages on standard error; warnings are marked."""

    def __init__(self) -> None:
        super().__init__("step", logging.INFO)

    def handle(self, record: logging.LogRecord) -> None:
        """See `logging.Logger`."""
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{mark}{record.getMessage()}", file=sys.stderr, flush=True)
