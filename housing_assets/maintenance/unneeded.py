"""What is not needed any more: references, model versions, results of steps, evidence, captured requests, old runs.

Each function finds things of one kind and says how they are removed; `retention` decides what happens to them.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg
from pydantic import ValidationError

from housing_assets.code_location import asset_keys, definitions
from housing_assets.maintenance.inventory import Removable
from housing_assets.runs.executor import FINISHED
from resources.endpoints.captured_files import CapturedFile
from resources.inventory import RESULT_FILE
from resources.model_registry.base import ModelVersion, champion_of
from resources.references.evidence import EvidenceStore
from resources.references.io_manager import (
    StoredReference,
    asset_folder,
    materializations,
    read_reference,
    reference_files,
)
from step_scripts.runner import storage
from step_scripts.runner.wording import counted, megabytes

_RUNS_AT_ONCE = 200


@dataclass
class References:
    """What the reference files below a root say, by URI.

    `current`: those that a step may read. `waiting`: those that only their own run, or one that continues it, may read.
    `surplus`: those that may go. `latest_runs`: the runs that made the assets' latest versions, below this root or
    another one; without their events nobody would find the references.
    """

    current: dict[str, StoredReference] = field(default_factory=dict)
    waiting: dict[str, StoredReference] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)
    latest_runs: set[str] = field(default_factory=set)


def find_references(
    instance: dg.DagsterInstance,
    root: str,
    *,
    before: datetime,
    forgotten: datetime,
    busy: Collection[str],
) -> References:
    """Look through the reference files of all assets.

    Current are those that the event log names as the latest of an asset or a partition, and those of which it knows
    nothing newer: they may stand in another event log. The others go if they were written `before` that time, unless
    their run is `busy`. Older than `forgotten` the log does not know partitions, because it has lost their runs: those
    go too. Raises `ValueError` naming the latest reference of an asset if it cannot be read.
    """
    found = References()
    for key, files in reference_files(root, asset_keys()).items():
        latest: dict[str | None, tuple[str, float]] = {}
        folders: set[str] = set()
        folder = asset_folder(root, key)
        for record, uri in materializations(instance, key):
            place = uri.rpartition("/")[0]
            if place not in folders:
                folders.add(place)
                found.latest_runs.add(record.run_id)
            if place == folder:
                latest.setdefault(record.partition_key, (uri, record.timestamp))
        named = {uri for uri, _ in latest.values()}
        newest = max((time for _, time in latest.values()), default=0.0)
        for uri, (_, modified) in files.items():
            try:
                stored = read_reference(uri)
            except ValidationError as error:  # damaged, or of another version of the code: no step can read it
                if uri in named:
                    asset = key.to_user_string()
                    raise ValueError(f"{uri} is damaged ({error}): materialize {asset} again, or remove it") from error
                found.surplus += [uri] if modified < before.timestamp() else []
                continue
            partitions = stored.partitions or (None,)
            superseded = all(p in latest and latest[p][1] > modified for p in partitions)
            lost = modified < min(newest, forgotten.timestamp())
            if uri in named or not (superseded or lost):
                found.current[uri] = stored
            elif modified < before.timestamp() and stored.run_id not in busy:
                found.surplus.append(uri)
            else:
                found.waiting[uri] = stored
    return found


def uris_in(references: Iterable[StoredReference]) -> set[str]:
    """All URIs in the values of references: what lies there is in use."""
    values = nested([stored.value for stored in references])
    return {value["uri"] for value in values if isinstance(value, dict) and isinstance(value.get("uri"), str)}


def commits_in(values: Any) -> dict[str, set[int]]:
    """Commits of feature groups that references and lineages name, by group."""
    found: dict[str, set[int]] = {}
    for value in nested(values):
        if isinstance(value, dict):
            group, commit = value.get("group"), value.get("commit")
            if isinstance(group, str) and isinstance(commit, int):
                found.setdefault(group, set()).add(commit)
    return found


def nested(value: Any) -> Iterator[Any]:
    """A JSON value, and all values in it."""
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(item)


def reasons_to_keep(versions: Sequence[ModelVersion], in_use: set[str], pending_since: datetime) -> dict[str, str]:
    """Why versions of a group stay however old they are, by their references; the strongest reason of each.

    `in_use`: URIs that assets refer to. Versions that wait for a decision stay if they were registered `pending_since`.
    """
    reasons: dict[str, str] = {}
    for version in versions:
        if version.status == "PendingManualApproval" and version.created_at >= pending_since:
            reasons[version.reference] = "it waits for a decision"
        if _refers_into(in_use, version.artifact.uri):
            reasons[version.reference] = "an asset refers to it"
    if champion := champion_of(versions, ""):
        if before := champion_of(versions, champion.artifact.digest):
            reasons[before.reference] = "the latest approved version is compared with it"
        reasons[champion.reference] = "it is the latest approved version"
    return reasons


def unused_results(root: str, in_use: set[str], before: datetime) -> Iterator[Removable]:
    """Folders `<root>/<step>/<request digest>` last changed `before`, that no URI in use points into.

    Other things there are not ours.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for path, size, modified in storage.list_details(root):
        if match := RESULT_FILE.fullmatch(path):
            found.setdefault(storage.join(root, match["step"], match["digest"]), []).append((size, modified))
    for uri, files in sorted(found.items()):
        if max(modified for _, modified in files) < before.timestamp() and not _refers_into(in_use, uri):
            size = sum(size for size, _ in files)
            detail = f"{counted(len(files), 'file')}, {megabytes(size)}"
            yield Removable("result", uri, uri, detail, functools.partial(storage.delete_folder, uri), size)


def unneeded_evidence(evidence: EvidenceStore, known: set[str], before: datetime) -> Iterator[Removable]:
    """Evidence from `before`, where nothing mentions any digest that was judged."""
    names = ("group", "endpoint")  # no digests: what is named so may hold other content now
    for uri, at, found in evidence.stored():
        needed = found and any(v in known for k, v in found.judged.inputs.items() if k not in names)
        if at < before and not needed:
            detail = f"of check {found.check}" if found else "damaged"
            yield Removable("evidence", uri, uri, detail, functools.partial(evidence.remove_file, uri))


def captured_folders(
    files: Sequence[CapturedFile], remove: Callable[[Sequence[CapturedFile]], None]
) -> Iterator[Removable]:
    """These captured requests, a folder at once: there may be a file a minute."""
    for folder in sorted({file.folder for file in files}):
        chosen = [file for file in files if file.folder == folder]
        size = sum(file.bytes for file in chosen)
        detail = (
            f"{counted(len(chosen), 'file')}, {megabytes(size)}, the latest of {chosen[-1].changed_at:%Y-%m-%d %H:%M}"
        )
        yield Removable("captured requests", folder, folder, detail, functools.partial(remove, chosen), size)


def old_runs(
    instance: dg.DagsterInstance, before: datetime, own: dg.DagsterRun, needed: Collection[str] = ()
) -> list[str]:
    """Ids of this code location's runs that were made and have ended before that time, oldest first.

    Without those that are `needed` or hold the latest materialization of an asset: the asset's metadata is theirs.
    """
    kept = {record.asset_entry.last_run_id for record in instance.get_asset_records()} | {*needed, own.run_id}
    ended = dg.RunsFilter(statuses=FINISHED, created_before=before)
    runs = [r.dagster_run for r in instance.get_run_records(ended, limit=_RUNS_AT_ONCE, ascending=True)]
    assets, jobs = set(asset_keys()), {job.name for job in definitions().resolve_all_job_defs()}

    def is_ours(run: dg.DagsterRun) -> bool:
        # A run that the UI or the daemon has launched names its code location. One from the command line does not:
        # then its job, and for a materialization its assets, must be ours.
        here, place = _code_location(own), _code_location(run)
        if here is not None and place is not None:
            return place == here
        if not run.job_name.startswith("__"):
            return run.job_name in jobs
        chosen = {*(run.asset_selection or ()), *(check.asset_key for check in run.asset_check_selection or ())}
        return bool(chosen) and chosen <= assets

    return [run.run_id for run in runs if run.run_id not in kept and is_ours(run)]


def _code_location(run: dg.DagsterRun) -> str | None:
    origin = run.remote_job_origin
    return origin.repository_origin.code_location_origin.location_name if origin else None


def _refers_into(uris: set[str], folder: str) -> bool:
    return any((uri + "/").startswith(folder + "/") for uri in uris)
