"""What blocking checks have found, kept where the artifacts live: it decides whether an asset behind them may start.

Layout: `<root>/<asset>/<check>/<subject>/<inputs>.<time>.<run>.json`. Every evaluation is a file of its own, so that
two runs never overwrite each other's; older ones of exactly the same inputs are removed when a newer one stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
from pydantic import Field, ValidationError

from resources.inventory import NotOwned, OwnedItem, files_below, remove_empty
from step_scripts.runner import storage
from step_scripts.runner.contract import FrozenModel
from step_scripts.runner.wording import counted, number

_TIME = "%Y%m%dT%H%M%S%fZ"
_FILE = re.compile(r"(?P<inputs>[0-9a-f]{16})\.(?P<time>\d{8}T\d{12}Z)\.[\w-]+\.json")
_PATH = re.compile(rf"([^/]+/[^/]+)/[^/]+/{_FILE.pattern}")
_SUBJECT_LENGTH = 32
_READS = 5  # an evaluation that is superseded between listing and reading is gone; its successor is there
_EMPTY_LOOKS = 4  # before nothing is taken for nothing


class EvidenceUnreadable(ValueError):
    """A file of evidence is damaged. The message names it."""


class Judged(FrozenModel):
    """What the blocking checks of an asset judge: digests of content, and what else the result depends on.

    `subject` brings results about the same thing together (of a model: all its evaluations).
    """

    asset: str
    subject: str
    inputs: dict[str, str | float]

    @property
    def digest(self) -> str:
        """Of exactly these inputs; 16 digits."""
        content = json.dumps([self.asset, self.subject, self.inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value[:12]}" if isinstance(value, str) else f"{name} {number(value)}"
            for name, value in self.inputs.items()
        )


class Evidence(FrozenModel):
    """One evaluation of a blocking check. `figures` are the plain values of its metadata, the threshold among them."""

    check: str
    judged: Judged
    passed: bool
    severity: str
    description: str = ""
    figures: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    run_id: str
    at: datetime

    @property
    def blocks(self) -> bool:
        """Whether Dagster would stop a run for it: a failure that only warns does not."""
        return not self.passed and self.severity == dg.AssetCheckSeverity.ERROR.value


class EvidenceStore(dg.ConfigurableResource):
    """Results of blocking checks below `root`, locally or on S3. Any number of processes may use it at once."""

    root: str = Field(description="Folder or s3:// prefix of the evidence.")

    def record(self, evidence: Evidence) -> str:
        """Keep an evaluation as the latest of its inputs and of its subject. Returns the URI of its file.

        Later than every other that can be seen, whatever the clocks of the machines say.
        """
        folder = self.folder_of(evidence.judged, evidence.check)
        times = [_time_of(name) for name in self._names(folder)]
        at = max([evidence.at.astimezone(UTC), *(time + timedelta(microseconds=1) for time in times)])
        name = f"{evidence.judged.digest}.{at.strftime(_TIME)}.{evidence.run_id[:8]}.json"
        kept = evidence.model_copy(update={"at": at})
        storage.write_bytes(storage.join(folder, name), kept.model_dump_json(indent=2).encode())
        same = sorted(n for n in self._names(folder) if n.startswith(evidence.judged.digest))
        storage.delete_files(folder, same[:-1])
        return storage.join(folder, name)

    def latest(self, judged: Judged, check: str, *, of_subject: bool = False) -> Evidence | None:
        """The latest evaluation of exactly these inputs, or of anything about the same subject; None if there is none.

        Raises `EvidenceUnreadable`.
        """
        folder = self.folder_of(judged, check)
        for attempt in range(_READS):
            names = [n for n in self._names(folder) if of_subject or n.startswith(judged.digest)]
            if not names:
                # A listing may miss both a file that is being replaced and its successor: one look is not enough.
                if attempt + 1 < _EMPTY_LOOKS and storage.exists(folder):
                    continue
                return None
            uri = storage.join(folder, max(names, key=_time_of))
            with contextlib.suppress(FileNotFoundError):
                try:
                    return Evidence.model_validate_json(storage.read_bytes(uri))
                except ValidationError as error:
                    raise EvidenceUnreadable(
                        f"{uri} cannot be read ({counted(error.error_count(), 'error')})"
                    ) from error
        raise EvidenceUnreadable(f"evidence in {folder} changes again and again while it is read")

    def folder_of(self, judged: Judged, check: str) -> str:
        """Where evaluations about the same subject lie."""
        subject = re.sub(r"[^\w-]", "-", judged.subject)[:_SUBJECT_LENGTH]
        return storage.join(self.root, judged.asset, check, subject)

    def stored(self) -> Iterator[tuple[str, datetime, Evidence | None]]:
        """All files: URI, time of the evaluation, and the evaluation (None: the file is damaged)."""
        for path in self._files():
            uri = storage.join(self.root, path)
            try:
                evidence = Evidence.model_validate_json(storage.read_bytes(uri))
            except FileNotFoundError:
                continue
            except ValidationError:
                evidence = None
            yield uri, _time_of(path.rpartition("/")[2]), evidence

    def inventory(self) -> Sequence[OwnedItem]:
        """An item a check: its evaluations. Other files there are not ours."""
        return files_below(self.root, _PATH, "evidence of")

    def remove(self, item: OwnedItem) -> None:
        """Remove what `inventory` listed; nothing happens if it is gone. Raises `NotOwned` for what is another's."""
        if not item.location.startswith(f"{self.root.rstrip('/')}/"):
            raise NotOwned(f"{item.location} is not below {self.root}")
        for path in self._files():
            uri = storage.join(self.root, path)
            if uri.startswith(f"{item.location}/"):
                self.remove_file(uri)

    def remove_file(self, uri: str) -> None:
        """Remove one file that `stored` listed, and with it the folders that this leaves empty."""
        storage.delete_file(uri)
        folder = uri
        while (folder := folder.rpartition("/")[0]).startswith(self.root.rstrip("/")):
            remove_empty(folder)

    def _files(self) -> list[str]:
        return [path for path, _, _ in storage.list_details(self.root) if _PATH.fullmatch(path)]

    def _names(self, folder: str) -> list[str]:
        return [path for path, _, _ in storage.list_details(folder) if _FILE.fullmatch(path)]


def _time_of(name: str) -> datetime:
    match = _FILE.fullmatch(name)
    assert match is not None, name
    return datetime.strptime(match["time"], _TIME).replace(tzinfo=UTC)
